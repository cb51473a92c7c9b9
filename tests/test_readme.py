"""What the README says can be done, can be done."""

import re
import shlex
from pathlib import Path

import pytest
import tomli_w
import typer

from corolla.aggregation import AGGREGATORS, build_method
from corolla.cli import app
from corolla.server.config import Config
from corolla.simulations.simulate import load_config
from tests.aggregation.test_methods import EXACT
from tests.simulations.federation import tiny_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
LINES = [line.partition("#")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("corolla ")])
def test_every_command_parses(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, arguments)
    assert context.args == []
    for setting in context.params.get("settings") or ():
        load_config(None, [setting])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_every_make_target_exists(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_it_opens_with_a_sentence_and_two_commands():
    title, sentence, block = README.split("\n\n")[:3]
    assert title == "# Corolla"
    assert sentence.count(". ") == 0
    assert [line.split("  ")[0] for line in block.splitlines()[1:-1]] == ["make demo", "make test"]


def test_the_configuration_is_one(tmp_path):
    (text,) = [text for kind, text in BLOCKS if kind == "toml"]
    (tmp_path / "my.toml").write_text(text)
    config = Config.load(tmp_path / "my.toml")
    assert [config.clients.rank(k) for k in range(6)] == [64, 32, 16, 8, 4, 64]
    assert config.train.local_steps is None


def test_the_table_of_methods_is_the_registry():
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if line.startswith("| `")
    ]
    methods = {row[0]: row for row in rows if len(row) == 4}
    assert set(methods) == set(AGGREGATORS)
    for name, (_, _, mixed, exact) in methods.items():
        assert mixed == ("–" if name == "full" else "yes" if build_method(name).mixed_ranks else "no")
        assert (exact == "yes") == (name in EXACT)


def test_the_python_runs(tiny_folder, tmp_path, monkeypatch):
    (text,) = [text for kind, text in BLOCKS if kind == "python"]
    monkeypatch.chdir(tmp_path)
    values = tiny_config(tiny_folder, tmp_path / "run", run={"rounds": 1}).model_dump(exclude_none=True, mode="json")
    (tmp_path / "my.toml").write_text(tomli_w.dumps(values))
    names: dict = {}
    exec(text, names)
    assert names["run"].folder == Path("runs/seed-1")
    assert names["run"].metrics[0]["kind"] == "evaluation"
    assert names["run"].adapter


def test_every_link_and_folder_is_there():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README) + re.findall(r"^\| `(\w+/)`", README, re.MULTILINE):
        assert (ROOT / target).exists(), target
