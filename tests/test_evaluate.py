"""`corolla evaluate` as a person uses it: on a file, on multiple choice, on lm-eval's tasks."""

import builtins
import json

import pytest
import torch

from corolla import simulate
from tests.client.test_choices import questions
from tests.simulations.federation import tiny_config
from tests.test_cli import run

TASK = """
task: local_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run that moves the model far enough for base and global to differ."""
    changes = {"train": {"local_steps": 20, "learning_rate": 2e-2}, "adapter": {"target_modules": "all-linear"}}
    out = tmp_path_factory.mktemp("run")
    data = {"tasks_train": 8, "tasks_held_out": 1, "max_new_tokens": 2, "template": "chat"}
    config = tiny_config(tiny_folder, out, run={"rounds": 1, "evaluate": "never"}, data=data, **changes)
    return simulate(config, overwrite=True).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task of lm-eval beside its data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    (folder / "local_questions.yaml").write_text(TASK)
    return folder


def rows_of(output: str) -> dict[str, list[float]]:
    """The printed table: name -> base, global."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {name: [float(base), float(tuned)] for name, base, tuned in cells}


def test_multiple_choice_and_lm_eval_agree(finished, folder, tmp_path):
    """The same questions, once by our own evaluation and once by the harness, for the base and for the run."""
    pytest.importorskip("lm_eval")
    answers = tmp_path / "answers.jsonl"
    ours = run("evaluate", finished, "--data", folder / "questions.jsonl", "--answers", answers)
    assert ours.exit_code == 0, ours.output
    theirs = run("evaluate", finished, "--tasks", folder)
    assert theirs.exit_code == 0, theirs.output + repr(theirs.exception)
    own, harness = rows_of(ours.output), rows_of(theirs.output)
    assert own["choice_accuracy"] == harness["local_questions/acc"]
    assert own["choice_accuracy_norm"] == harness["local_questions/acc_norm"]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert any(line["base"] != line["global"] for line in lines)
    assert sum(line["global"] == line["answer"] for line in lines) / 40 == pytest.approx(own["choice_accuracy"][1])
    assert [len(line["base_log_p"]) for line in lines] == [len(line["choices"]) for line in lines]


def test_the_first_examples_of_a_task_alone(finished, folder):
    pytest.importorskip("lm_eval")
    done = run("evaluate", finished, "--tasks", folder, "--limit", 3)
    assert done.exit_code == 0, done.output
    share = rows_of(done.output)["local_questions/acc"][0]
    assert 3 * share == pytest.approx(round(3 * share), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "evaluate needs --data"),
        (["--data", "x.jsonl", "--tasks", "x"], "evaluate needs --data"),
        (["--data", "x.jsonl", "--limit", "2"], "evaluate needs --data"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_wrong_options_are_one_message(options, message, finished):
    done = run("evaluate", finished, *options)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")


def test_an_unknown_task_is_named_with_the_cure(finished, tmp_path):
    pytest.importorskip("lm_eval")
    done = run("evaluate", finished, "--tasks", tmp_path)
    assert done.exit_code == 1
    assert "write task files" in done.output.replace("\n", " ")


def test_without_lm_eval_the_cure_is_named(finished, folder, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError("no lm_eval here")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run("evaluate", finished, "--tasks", folder)
    assert done.exit_code == 1
    assert "pip install 'corolla[eval]'" in done.output.replace("\n", " ")


def test_evaluating_leaves_the_base_as_it_was(tiny, finished, folder):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    assert run("evaluate", finished, "--data", folder / "questions.jsonl").exit_code == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())
