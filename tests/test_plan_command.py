"""`corolla plan`: a row a rank, the choice, and a clear word where nothing fits."""

from unittest.mock import patch

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from corolla import cli, plan, terminal
from tests.simulations.federation import tiny_config


@pytest.fixture
def run(tiny_folder, tmp_path):
    values = tiny_config(tiny_folder, tmp_path / "run", clients={"ranks": "auto", "max_rank": 16})
    (tmp_path / "my.toml").write_text(tomli_w.dumps(values.model_dump(exclude_none=True, mode="json")))

    def call(*arguments: object):
        wide = Console(width=200)
        with patch.object(plan, "console", wide), patch.object(terminal, "console", wide):
            return CliRunner().invoke(cli.app, ["plan", str(tmp_path / "my.toml"), *map(str, arguments)])

    return call


def test_a_row_a_rank_and_the_choice(run):
    done = run("--memory", 64, "--length", 32)
    assert done.exit_code == 0, done.output
    assert "on cpu, 32 tokens, 64.00 GiB (MiB)" in done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["16", "8", "4", "2", "1"]
    assert {row[9] for row in rows} == {"yes"}
    assert float(rows[0][11]) == pytest.approx(4 * 16 * 2 * (64 + 48) / 2**20, abs=0.06)
    assert "rank 16, micro-batch 4 × 1:" in done.output


def test_where_nothing_fits_the_table_is_shown_and_the_cure(run):
    done = run("--memory", 0.01)
    assert done.exit_code == 1
    assert " no " in done.output
    assert "got 0.01: use a smaller base, model.quantization, train.checkpointing" in done.output


def test_another_base_must_be_there(run, tmp_path):
    done = run("--model", tmp_path / "nowhere")
    assert done.exit_code == 1
    assert "no such path" in done.output.replace("\n", " ")


def test_another_kind_than_lora_is_not_planned_as_if_it_were_one(run):
    done = run("--memory", 64, "--set", "adapter.kind=miss", "--set", "clients.ranks=4")
    assert done.exit_code == 1
    assert "a plan is LoRA's, got adapter.kind = 'miss'" in " ".join(done.output.split())
