"""The command line as a person uses it."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest
from rich.console import Console
from typer.testing import CliRunner

from corolla import cli, simulate
from corolla.server.config import Config
from corolla.server.folder import RunFolder
from tests.simulations.federation import tiny_config


def run(*arguments: object):
    with patch.object(cli, "console", Console(width=160)):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    changes = {"train": {"local_steps": 40, "learning_rate": 1e-2}, "adapter": {"target_modules": "all-linear"}}
    return simulate(tiny_config(tiny_folder, out, run={"rounds": 2, "evaluate": "never"}, **changes))


def settings(config: Config) -> list[str]:
    return [part for key, value in config.flat().items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize(
    "command", [[], ["simulate"], ["compare"], ["export"], ["evaluate"], ["settings"], ["data", "preview"]]
)
def test_every_command_has_help(command):
    shown = run(*command, "--help")
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    assert all(word in shown.output for word in (["simulate", "export", "evaluate"] if not command else ["--help"]))


def test_settings_lists_every_setting():
    shown = run("settings").output
    assert all(key in shown for key in Config().flat())


def test_simulate_prints_rounds_and_a_table(tiny_folder, tmp_path):
    config = tiny_config(tiny_folder, tmp_path / "run", run={"alone": True})
    done = run("simulate", *settings(config), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    for words in (
        "round 1: 3 clients",
        "round 2",
        "(exact)",
        "client-001",
        "rank 4",
        "average",
        "held-out loss",
    ):
        assert words in done.output
    again = run("simulate", *settings(config), "--out", tmp_path / "run")
    assert again.exit_code == 1
    assert "--resume or --overwrite" in again.output
    longer = run("simulate", "--resume", tmp_path / "run", "--set", "run.rounds=3")
    assert longer.exit_code == 0, longer.output
    assert RunFolder.open(tmp_path / "run").load().round == 3


def test_simulate_reads_a_file(tiny_folder, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        f'[model]\nname = "{tiny_folder}"\ndevice = "cpu"\n[data]\ntasks_train = 4\ntasks_held_out = 1\n'
        '[clients]\ncount = 2\nranks = "4..2"\n[train]\nlocal_epochs = 0.25\n[run]\nrounds = 1\nevaluate = "never"\n'
    )
    done = run("simulate", path, "--set", "run.seed=3", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = RunFolder.open(tmp_path / "run").config()
    assert (config.run.seed, config.train.local_steps, config.clients.rank(1)) == (3, None, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--set", "run.round=3"], "did you mean run.rounds?"),
        (["simulate", "no.toml"], "no.toml: no such file"),
        (["simulate", "--set", "model.name=./nowhere"], "no such path"),
        (["simulate", "--resume", "nowhere"], "nowhere without it"),
        (["export", "nowhere", "--out", "x"], "nowhere without it"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
for prompt in prompts:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    print(json.dumps(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)))
"""


@pytest.mark.process
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_export_gives_the_runs_own_answers_in_another_process(kind, finished, tiny_folder, tmp_path):
    out, data, answers = tmp_path / "out", tmp_path / "eval.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": "x", "family": "ab"[i % 2]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exported = run("export", finished.folder, "--out", out, *(["--merged"] if kind == "merged" else []))
    assert exported.exit_code == 0, exported.output
    assert "logits within" in exported.output
    shown = run("evaluate", finished.folder, "--data", data, "--answers", answers)
    assert shown.exit_code == 0, shown.output
    assert "exact_match/a" in shown.output
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    paths = (str(tiny_folder), str(out)) if kind == "adapter" else (str(out), "")
    other = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *paths, json.dumps([row["prompt"] for row in rows])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line) for line in other.stdout.splitlines()] == [line["global"] for line in lines]
    assert [line["global"] for line in lines] != [line["base"] for line in lines]


def test_export_cuts_by_rank_or_energy_and_says_what_is_lost(finished, tmp_path):
    by_rank = run("export", finished.folder, "--out", tmp_path / "rank", "--rank", 3)
    assert by_rank.exit_code == 0, by_rank.output
    assert json.loads((tmp_path / "rank" / "adapter_config.json").read_text())["r"] == 3
    by_energy = run("export", finished.folder, "--out", tmp_path / "energy", "--energy", 0.9)
    lost = float(by_energy.output.split("cut ")[1].split(" of")[0])
    assert 0 < lost <= 0.1**0.5
    full = run("export", finished.folder, "--out", tmp_path / "full")
    assert float(full.output.split("cut ")[1].split(" of")[0]) < 1e-6
    assert run("export", finished.folder, "--out", tmp_path / "full").exit_code == 1
    assert "(0, 1]" in run("export", finished.folder, "--out", tmp_path / "no", "--energy", 99).output


def test_an_earlier_round_can_be_exported(finished, tmp_path):
    assert run("export", finished.folder, "--out", tmp_path / "one", "--round", 1).exit_code == 0
    assert "rounds [1, 2]" in run("export", finished.folder, "--out", tmp_path / "nine", "--round", 9).output


def test_a_run_on_another_base_is_refused(finished, tmp_path):
    from tests.tiny import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=5)
    config = finished.config.model_copy(update={"model": finished.config.model.model_copy(update={"name": str(other)})})
    copy = RunFolder(tmp_path / "copy")
    import shutil

    shutil.copytree(finished.folder, copy.path)
    copy.write_config(config)
    done = run("export", copy.path, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "the run was made on the base" in done.output.replace("\n", " ")


def test_resume_takes_no_other_configuration(tmp_path):
    done = run("simulate", "my.toml", "--resume", tmp_path)
    assert done.exit_code == 1
    assert "--set alone" in done.output
