"""Results of any task are shown: another score than exact match, and a loss alone."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from corolla import cli, laboratory, terminal
from corolla.client.tasks import causal_lm
from corolla.server.folder import RunFolder
from corolla.simulations.report import gather, write_figures, write_report
from corolla.simulations.simulate import Run
from corolla.simulations.suite.cells import DONE, Outcome
from corolla.simulations.suite.config import Suite
from corolla.simulations.suite.table import SuiteResult
from tests.simulations.federation import tiny_config


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """A run whose examples have no right answers, as plain text has none, and what the command line printed."""

    def evaluate(model, base, examples, config):
        return {"examples": float(len(examples)), "held_out_loss": causal_lm.mean_loss(model, base, examples)}

    out = tmp_path_factory.mktemp("runs") / "plain"
    config = tiny_config(tiny_folder, out, run={"alone": True, "rounds": 1, "evaluate": "each"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_lm, "TASK", replace(causal_lm.TASK, evaluate=evaluate))
        settings = [part for key, value in config.flat().items() for part in ("--set", f"{key}={value}")]
        done = run("simulate", *settings, "--out", out)
        assert done.exit_code == 0, done.output + repr(done.exception)
    return out, done.output


def test_a_run_with_a_loss_alone_is_shown_everywhere(plain, tmp_path):
    out, output = plain
    assert "after round 1: held-out loss" in output
    assert "exact match" not in output.lower()
    assert "Held-out loss on held-out examples" in output
    comparison = Run(out).comparison
    assert comparison.metric == "held_out_loss"
    last = [line for line in RunFolder.open(out).lines() if line["kind"] == "evaluation"][-1]
    assert comparison.columns["global"]["all"] == pytest.approx(last["mean"]["held_out_loss"])
    assert gather([out])["runs"][0]["score"] is None
    assert write_report([out], tmp_path / "report.html").is_file()
    names = {path.stem for path in write_figures([out], tmp_path / "figures")}
    assert "held-out-loss" in names
    assert not any("match" in name for name in names)


def test_another_score_is_shown_by_its_name(plain, tmp_path):
    """The same run as a classifier's would be, with a server's own examples."""
    out = tmp_path / "labels"
    shutil.copytree(plain[0], out)
    lines = RunFolder.open(out).lines()
    for line in (line for line in lines if line["kind"] == "evaluation"):
        scores = {"accuracy": 0.25 + 0.5 * line["round"]}
        line |= {"score": "accuracy", "mean": line["mean"] | scores, "server": {"held_out_loss": 0.5, **scores}}
        line["clients"] = {name: found | scores for name, found in line["clients"].items()}
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "accuracy 75.0%; server: held-out loss 0.500, accuracy 75.0%" in terminal.describe_line(lines[-1])
    document = gather([out])["runs"][0]
    assert (document["score"], document["score_title"]) == ("accuracy", "Accuracy")
    names = {path.stem for path in write_figures([out, plain[0]], tmp_path / "figures")}
    assert {"accuracy", "accuracy-by-bytes", "held-out-loss"} <= names


@pytest.mark.parametrize(
    ("numbers", "titles", "cells"),
    [
        ({"held_out_loss": 1.5}, ["held-out loss", "up KiB"], ["1.500", "–"]),
        (
            {"held_out_loss": 1.5, "preference_accuracy": 0.75},
            ["held-out loss", "preference accuracy %", "up KiB"],
            ["1.500", "75.0", "–"],
        ),
    ],
)
def test_a_suites_table_has_the_score_that_its_task_has(numbers, titles, cells, tmp_path):
    suite = Suite.build({"title": "T", "methods": ["flora"], "seeds": [0], "reference": "flora", "settings": {"a": {}}})
    outcomes = [Outcome(row, "a", 0, tmp_path / row, DONE, numbers=numbers) for row in suite.rows]
    result = SuiteResult.of(suite, outcomes)
    assert result.header()[2 : 2 + len(titles)] == titles
    assert [line[2 : 2 + len(cells)] for line in result.lines("a")] == [cells] * len(suite.rows)
    assert ("preference accuracy: pairs" in result.to_markdown()) == (len(titles) == 3)
    assert "held-out loss 1.500" in laboratory._describe_cell(outcomes[0], 1, 1)
