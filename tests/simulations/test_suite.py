"""Runs between runs: what is done is kept, what is refused or fails is named, and the table says what was measured."""

import json

import pytest
import tomli_w
import torch

from corolla import simulate
from corolla.aggregation import AGGREGATORS, add_adapters, scale_adapter
from corolla.server.config import ConfigError
from corolla.simulations.simulate import Watch
from corolla.simulations.suite import SUITES, cells, compare_suite
from corolla.simulations.suite.cells import divergence, traffic
from corolla.simulations.suite.config import REFERENCES, Suite
from corolla.simulations.suite.table import Statistic, SuiteResult
from corolla.simulations.suite.tiny_base import Recipe, build_tokenizer, draw_examples, recipe_key, tiny_base
from tests.test_cli import run as command


def mini(model, **changes) -> dict:
    """Two methods, two settings and two seeds of two rounds of one step."""
    values = {
        "title": "Mini",
        "methods": ["warm", "zero-padding"],
        "seeds": [0, 1],
        "reference": "warm",
        "config": {
            "model": {"name": str(model), "device": "cpu"},
            "data": {"tasks_train": 4, "tasks_held_out": 1, "max_new_tokens": 2, "probe": 1},
            "clients": {"count": 2},
            "train": {"local_steps": 1, "batch_size": 2, "learning_rate": 1e-2},
            "run": {"rounds": 2, "threads": 1},
        },
        "settings": {"one-rank": {"clients.ranks": 3}, "mixed": {"clients.ranks": [4, 2], "data.partition": "iid"}},
    }
    return values | changes


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    return compare_suite(mini(tiny_folder), out=out), out


def test_every_row_of_every_setting_is_there_with_its_seeds(finished):
    result, out = finished
    assert [row.name for row in result.rows] == [*REFERENCES, "warm", "zero-padding"] * 2
    assert {row.n for row in result.rows} == {2}
    assert not result.failed
    for row in result.rows:
        assert ("bytes_up" in row.numbers) == (row.name in ("warm", "zero-padding", "one-round")), row.name
    markdown = result.to_markdown()
    assert markdown == (out / "table.md").read_text()
    assert markdown.count("## ") == 2
    assert markdown.count("| zero-padding | 2 |") == 2
    assert "the base model and evaluations are not counted" in markdown
    assert json.loads((out / "table.json").read_text()) == json.loads(json.dumps(result.to_json()))


def test_mean_and_spread_are_those_over_the_seeds(finished):
    """1 and 4: mean 2.5, standard deviation √((1.5² + 1.5²) / 1)."""
    assert Statistic.of([1.0, 4.0]) == Statistic(2.5, pytest.approx(4.5**0.5), 2)
    assert Statistic.of([3.0]) == Statistic(3.0, None, 1)
    result, out = finished
    losses = [json.loads((out / f"mixed/warm/seed-{seed}/cell.json").read_text())["held_out_loss"] for seed in (0, 1)]
    found = result.row("mixed", "warm").numbers["held_out_loss"]
    assert found.mean == pytest.approx(sum(losses) / 2)
    assert found.spread == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert found.spread > 0
    assert f"| warm | 2 | {found.mean:.3f} ± {found.spread:.3f} |" in result.to_markdown()


def test_divergence_is_the_dense_distance_from_the_exact_run(finished):
    result, out = finished
    folders = [out / f"mixed/{name}/seed-0" for name in ("zero-padding", "warm")]
    ours, theirs = (
        {m: d.B.double() @ d.A.double() for m, d in cells.whole(cells.RunFolder(f).load(1).model).items()}
        for f in folders
    )
    pairs = [(ours[m], theirs[m]) for m in theirs]
    expected = (sum((a - b).norm() ** 2 for a, b in pairs) / sum(b.norm() ** 2 for _, b in pairs)) ** 0.5
    found = divergence(*folders)
    assert list(found) == [1, 2]
    assert found[1] == pytest.approx(float(expected), rel=1e-4)
    assert found[1] > 0.01
    row = result.row("mixed", "zero-padding")
    assert row.divergence[2] == row.numbers["divergence"]
    assert row.numbers["divergence"].mean == pytest.approx(
        sum(divergence(out / f"mixed/zero-padding/seed-{s}", out / f"mixed/warm/seed-{s}")[2] for s in (0, 1)) / 2
    )
    assert result.row("mixed", "warm").numbers["divergence"].mean < 1e-6
    between = result.between_seeds["mixed"][2]
    assert between == Statistic(divergence(out / "mixed/warm/seed-1", out / "mixed/warm/seed-0")[2], None, 1)
    assert between.mean > 0.1
    assert f"| warm, next seed | {result.between_seeds['mixed'][1].mean:.3f} |" in result.to_markdown()


def test_all_rows_are_measured_on_the_same_examples(finished):
    result, _ = finished
    for row in result.rows:
        assert row.numbers["examples"] == Statistic(8.0, 0.0, 2), row.name
    losses = [result.row(setting, "base").numbers["held_out_loss"].mean for setting in ("one-rank", "mixed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len({round(row.numbers["held_out_loss"].mean, 7) for row in result.rows if row.setting == "mixed"}) == 6


def test_bytes_are_those_of_accepted_adapters_and_nothing_else(finished):
    """float32 factors of rank 3 on q (32×32) and v (16×32) of two layers, and nothing down before round two."""
    result, _ = finished
    numbers = result.row("one-rank", "warm").numbers
    assert numbers["bytes_up"].mean == 2 * 3 * (64 + 48) * 4
    zero_padding = result.row("one-rank", "zero-padding").numbers
    assert zero_padding["bytes_total"].mean == pytest.approx(
        4 * (zero_padding["bytes_up"].mean + zero_padding["bytes_down"].mean)
    )
    proof = {"certificate": {"relative_error": 0.5}}
    lines = [
        {"kind": "evaluation"},
        {
            "kind": "round", "successful": True, "seconds": 2.0, "update": proof, "quarantined": {"b": "NaN"},
            "clients": {"a": {"bytes_up": 10, "bytes_down": 4}, "b": {"bytes_down": 8}},
        },
    ]  # fmt: skip
    expected = {"bytes_up": 10, "bytes_down": 6, "bytes_total": 22, "certificate": 0.5, "lost": 1, "seconds": 2}
    assert traffic(lines) == expected


def test_a_suite_that_is_killed_goes_on_and_ends_with_the_same_table(tiny_folder, tmp_path):
    """Killed between the two rounds of the second method: eleven of thirteen trainings are not done again."""
    values = mini(tiny_folder, seeds=[0], settings={"mixed": {"clients.ranks": [4, 2]}})
    whole: list[str] = []
    straight = compare_suite(values, out=tmp_path / "straight", watch=Watch(whole.append))
    assert whole.count("train") == 13
    steps: list[str] = []

    def kill(what: str) -> None:
        steps.append(what)
        if steps.count("train") == 12:
            raise KeyboardInterrupt

    out, done = tmp_path / "killed", []
    with pytest.raises(KeyboardInterrupt):
        compare_suite(values, out=out, watch=Watch(kill), on_cell=lambda outcome, n, total: done.append(outcome.folder))
    assert [folder.parent.name for folder in done] == [*REFERENCES, "warm"]
    assert cells.RunFolder(out / "mixed/zero-padding/seed-0").rounds() == [1]
    before = {path: path.stat().st_mtime_ns for folder in done for path in folder.rglob("*") if path.is_file()}
    again: list[str] = []
    result = compare_suite(values, out=out, watch=Watch(again.append))
    assert again.count("train") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert result.to_markdown() == straight.to_markdown()
    nothing: list[str] = []
    assert compare_suite(values, out=out, watch=Watch(nothing.append)).to_markdown() == straight.to_markdown()
    assert not nothing


def test_a_refusal_is_a_cell_and_a_failure_is_named(tiny_folder, tmp_path):
    """FedIT refuses mixed ranks; zero-padding fails at a learning rate that gives no finite loss."""
    values = mini(
        tiny_folder,
        methods=["fedit", "zero-padding"],
        seeds=[0],
        **{"methods-settings": {"zero-padding": {"train.learning_rate": 1e38}}},
    )
    values["config"]["train"] |= {"local_steps": 3}
    values["settings"]["mixed"] = {"clients.ranks": [4, 2]}
    result = compare_suite(values, out=tmp_path)
    assert "fedit" in result.row("mixed", "fedit").refused[0]
    assert result.row("mixed", "fedit").n == 0
    assert result.row("one-rank", "fedit").n == 1
    assert [(o.setting, o.row) for o in result.failed] == [("one-rank", "zero-padding"), ("mixed", "zero-padding")]
    assert "no round of 2 succeeded" in result.failed[0].reason
    markdown = result.to_markdown()
    assert "| fedit | 0 | refused: fedit" in markdown
    assert "- zero-padding in mixed, seed 0, failed: RuntimeError" in markdown
    (tmp_path / "suite.toml").write_text(tomli_w.dumps(values))
    shown = command("compare", tmp_path / "suite.toml", "--out", tmp_path, "--markdown", tmp_path / "copy.md")
    assert shown.exit_code == 1, shown.output
    assert "refused" in shown.output
    assert "seed 0, failed" in shown.output
    assert (tmp_path / "copy.md").read_text() == markdown


def test_lost_replies_are_said(finished):
    result, _ = finished
    lost = [cells.replace(o, numbers={**o.numbers, "lost": 2.0}) for o in result.outcomes if o.row == "warm"][:1]
    assert SuiteResult(result.suite, result.rows, tuple(lost), {}).notes() == [
        "warm in one-rank, seed 0, lost 2 replies of clients"
    ]
    assert not result.notes()


def test_a_method_that_does_not_fit_the_configuration_is_refused(tiny_folder, tmp_path):
    values = mini(tiny_folder, seeds=[0], methods=["flora"], settings={"own": {"adapter.init": "independent"}})
    result = compare_suite(values, out=tmp_path)
    assert "clients that draw their own A" in result.row("own", "warm").refused[0]
    assert result.row("own", "flora").n == 1
    assert not result.failed
    assert "divergence" not in result.row("own", "flora").numbers


def test_a_cell_with_other_settings_is_not_taken_for_this_one(finished, tiny_folder):
    _, out = finished
    values = mini(tiny_folder)
    values["config"]["train"] |= {"learning_rate": 2e-2}
    with pytest.raises(ConfigError, match=r"must keep its train\.learning_rate = 0\.01, got 0\.02: use another --out"):
        compare_suite(values, out=out)


def test_a_method_and_a_seed_can_be_added(tiny_folder, tmp_path):
    few = mini(tiny_folder, methods=["warm"], settings={"mixed": {"clients.ranks": [4, 2]}}, seeds=[0])
    compare_suite(few, out=tmp_path)
    steps: list[str] = []
    more = compare_suite(few | {"methods": ["flora"]}, out=tmp_path, watch=Watch(steps.append))
    assert [row.name for row in more.rows] == [*REFERENCES, "warm", "flora"]
    assert steps.count("train") == 4


def test_references_have_the_budget_that_they_should(tiny_folder, tmp_path, monkeypatch):
    """Two clients of three rounds of two steps: alone six steps each, together twelve, one round of six."""
    seen: list = []
    real = cells.train_once

    def spy(client, model, round_number):
        steps = client.settings.train.steps(len(client.data.train))
        seen.append((client.client_id, client.rank, len(client.data.train), steps, client.settings.rounds))
        return real(client, model, round_number)

    monkeypatch.setattr(cells, "train_once", spy)
    values = mini(tiny_folder, seeds=[0], methods=["warm"], settings={"mixed": {"clients.ranks": [2, 4]}})
    values["config"]["run"] |= {"rounds": 3}
    values["config"]["train"] |= {"local_steps": 2}
    compare_suite(values, out=tmp_path)
    assert seen == [("client-000", 2, 16, 6, 1), ("client-001", 4, 16, 6, 1), ("centralised", 4, 32, 12, 1)]
    config = cells.RunFolder(tmp_path / "mixed/one-round/seed-0").config()
    assert (config.run.rounds, config.train.local_steps, config.aggregation.method) == (1, 6, "flora")
    locals_ = [json.loads(p.read_text()) for p in sorted((tmp_path / "mixed/local-only").rglob("client-*.json"))]
    cell = json.loads((tmp_path / "mixed/local-only/seed-0/cell.json").read_text())
    assert len(locals_) == 2
    assert cell["held_out_loss"] == pytest.approx(sum(found["held_out_loss"] for found in locals_) / 2)


def test_a_federation_of_one_in_one_round_is_that_client_alone(tiny_folder, tmp_path):
    """local-only by another way: simulate with one client."""
    one = mini(tiny_folder, seeds=[0], methods=["warm"], settings={"one": {"clients.ranks": 4, "clients.count": 1}})
    result = compare_suite(one, out=tmp_path)
    config = cells.RunFolder(tmp_path / "one/one-round/seed-0").config()
    run = simulate(config, out=tmp_path / "again")
    alone = result.row("one", "local-only").numbers["held_out_loss"].mean
    assert alone == pytest.approx(cells.measure(run.adapter, config)["held_out_loss"], rel=1e-5)
    assert add_adapters(run.adapter, scale_adapter(run.adapter, -1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["warm"]}, "method is no key of a suite: did you mean methods?"),
        ({"methods": ["zeropadding"]}, "zeropadding is no aggregation method: did you mean zero-padding?"),
        ({"reference": "fedx-"}, "is no aggregation method"),
        ({"settings": {"a": {"run.round": 3}}}, "settings.a: run.round is no setting: did you mean run.rounds?"),
        ({"settings": {"a": {"run.rounds": 0}}}, "run.rounds: Input should be greater than or equal to 1, got 0"),
        ({"settings": {"a": {"run.seed": 1}}}, "run.seed is the suite's own: list it in seeds"),
        ({"settings": {"../a": {}}}, "must be one of a folder"),
        ({"config": {"train": {"lr": 1}}}, "config: train.lr is no setting"),
        ({"methods-settings": {"warm": {"data.probe": 2}}}, "data.probe must be the same for all methods"),
        ({"methods-settings": {"wram": {}}}, "wram is no row of this suite: did you mean warm?"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"base": "tiny"}, "got model.name as well"),
        ({"base": "large"}, "base: Input should be 'tiny', got 'large'"),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused_with_the_cure(changes, message, tiny_folder):
    with pytest.raises(ConfigError) as error:
        Suite.build(mini(tiny_folder, **changes))
    assert message in str(error.value)


def test_no_held_out_examples_are_an_error_before_any_training(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    data = {"data.train": str(tmp_path / "rows.jsonl"), "data.partition": "iid", "data.held_out_fraction": 0.0}
    steps: list[str] = []
    with pytest.raises(ValueError, match=r"needs held-out examples, got none"):
        compare_suite(mini(tiny_folder, settings={"a": data}), out=tmp_path, watch=Watch(steps.append))
    assert not steps


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_suites_can_be_used(path):
    suite = Suite.load(path)
    assert suite.base or "model.name" in suite.config
    assert {*suite.methods, suite.reference} <= set(AGGREGATORS)
    assert path.stem != "tiny" or set(suite.methods) == set(AGGREGATORS)


def test_suites_are_installed():
    assert {path.stem for path in SUITES.glob("*.toml")} == {"tiny", "smollm2"}


SHORT = Recipe(layers=1, width=16, heads=2, steps=3, batch_size=8, threads=1)


def test_the_tiny_base_is_made_once_and_is_the_same_every_time(tmp_path, monkeypatch, tiny_folder):
    weights = []
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        torch.manual_seed(len(name))
        steps: list[int] = []
        folder = tiny_base(SHORT, steps.append)
        assert steps == [1, 2, 3]
        assert tiny_base(SHORT, steps.append) == folder
        assert steps == [1, 2, 3]
        weights.append((folder / "model.safetensors").read_bytes())
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert weights[0] == weights[1]
    assert recipe_key(SHORT) != recipe_key(Recipe())
    other = tiny_base(Recipe(layers=1, width=16, heads=2, steps=3, batch_size=8, threads=1, seed=1))
    assert other != folder
    assert (other / "model.safetensors").read_bytes() != weights[0]
    values = mini(tiny_folder, base="tiny", methods=["warm"], seeds=[0], settings={"a": {}})
    del values["config"]["model"]["name"]
    result = compare_suite(values, out=tmp_path / "out", recipe=SHORT)
    assert result.row("a", "warm").n == 1
    assert cells.RunFolder(tmp_path / "out/a/warm/seed-0").config().model.name == str(folder)


def test_a_pretraining_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def kill(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_base(SHORT, kill)
    assert not list((tmp_path / "corolla/bases").iterdir())


def test_the_tiny_tokenizer_loses_nothing_and_its_text_is_not_the_tasks():
    tokenizer = build_tokenizer()
    text = 'Join with hyphens: apple Ada — {"Zürich": "日本"}\n 12-03'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("apple")["input_ids"]) == 1
    examples = draw_examples(0)
    prompts = [next(examples)[0] for _ in range(80)]
    assert all(prompts)
    assert not [p for p in prompts if ":" in p or "Give the" in p]
