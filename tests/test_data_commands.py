"""`corolla data`: the mask that is shown is the mask that is trained on, and every row is with one client."""

import json
from unittest.mock import patch

import pytest
from rich.console import Console
from typer.testing import CliRunner

from corolla import cli, data
from corolla.client.config import DataConfig
from corolla.client.data.partition import partition
from corolla.client.data.show import holdings
from corolla.client.data.sources import read_source


def run(*arguments: object):
    with patch.object(data, "console", Console(width=200)):
        return CliRunner().invoke(cli.app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})


def labelled(tmp_path, count=240, labels=4):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"t{i}", "label": f"l{(5 * i + i // 7) % labels}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_preview_marks_what_the_loss_sees(tiny_folder, tmp_path):
    rows = [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(3)] + [{"prompt": "no", "completion": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run("preview", path, "--set", f"model.name={tiny_folder}", "--set", "data.template=chat", "--rows", 2)
    assert shown.exit_code == 0, shown.output
    assert "format prompt-completion, 4 rows, 3 examples" in shown.output
    assert "1 empty" in shown.output
    assert "<|user|>ask 0<|end|><|assistant|>»say 0<|end|>«" in shown.output
    assert "»say 1<|end|>«" in shown.output
    assert "say 2" not in shown.output


def test_preview_of_a_broken_file_is_a_message_and_exit_code_1(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    shown = run("preview", path, "--set", f"model.name={tiny_folder}")
    assert shown.exit_code == 1
    assert "must have the columns of its format" in shown.output
    assert "Traceback" not in shown.output


def test_partition_shows_and_draws_who_has_what(tmp_path):
    settings = [f"data.train={labelled(tmp_path)}", "data.partition=dirichlet", "data.partition_column=label"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    shown = run("partition", *arguments, "--plot", tmp_path / "who.png")
    assert shown.exit_code == 0, shown.output
    assert all(f"client-00{k}" in shown.output for k in range(4))
    assert "training rows by label" in shown.output
    assert (tmp_path / "who.png").read_bytes()[:4] == b"\x89PNG"
    found = holdings(DataConfig(train=str(tmp_path / "rows.jsonl"), partition="iid", group="label"), 4, 0)
    assert sum(sum(counts.values()) for counts in found.train.values()) + sum(found.held_out.values()) == 240


KINDS = ["iid", "dirichlet", "pathological", "linear", "square", "exponential", "column"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_with_one_client_and_the_seed_decides(kind, tmp_path):
    rows = read_source(str(labelled(tmp_path)), DataConfig()).rows
    config = DataConfig(partition=kind, partition_column="label")
    parts = partition(rows, config, 4, seed=3)
    assert sorted(index for part in parts for index in part) == list(range(240))
    assert all(parts)
    assert parts == partition(rows, config, 4, seed=3)
    if kind != "column":
        assert parts != partition(rows, config, 4, seed=4)
    held_out = rows.select(range(0, 240, 5))
    other = partition(held_out, config, 4, seed=3, like=rows)
    assert sorted(index for part in other for index in part) == list(range(48))


def test_skews_are_what_they_are_called(tmp_path):
    rows = read_source(str(labelled(tmp_path)), DataConfig()).rows
    labels = rows["label"]

    def parts(kind, **options):
        return partition(rows, DataConfig(partition=kind, partition_column="label", **options), 4, seed=1)

    def skew(kind, **options):
        """The mean part of a client's largest label."""
        mine = [[labels[i] for i in part] for part in parts(kind, **options)]
        return sum(max(map(part.count, set(part))) / len(part) for part in mine) / 4

    assert skew("dirichlet", partition_alpha=0.05) > skew("dirichlet", partition_alpha=100) + 0.1
    assert abs(skew("dirichlet", partition_alpha=1000) - skew("iid")) < 0.1
    assert {len({labels[i] for i in part}) for part in parts("pathological", partition_labels=2)} == {2}
    sizes = [len(part) for part in parts("linear")]
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(4 * sizes[0], abs=4)


def test_held_out_rows_follow_the_training_rows(tmp_path):
    """A client that trains on one label alone holds out that label alone."""
    rows = read_source(str(labelled(tmp_path, labels=2)), DataConfig()).rows
    config = DataConfig(partition="pathological", partition_column="label", partition_labels=1)
    train = partition(rows, config, 2, seed=0)
    held_out = partition(rows.select(range(60)), config, 2, seed=0, like=rows)
    for mine, other in zip(train, held_out, strict=True):
        assert {rows["label"][i] for i in mine} == {rows["label"][i] for i in other}


def test_too_few_rows_for_the_clients_are_named(tmp_path):
    rows = read_source(str(labelled(tmp_path, count=3)), DataConfig()).rows
    with pytest.raises(ValueError, match="4 clients need as many rows, got 3"):
        partition(rows, DataConfig(partition="iid"), 4, seed=0)
