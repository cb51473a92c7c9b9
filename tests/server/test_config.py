"""One configuration, three ways in, and errors that say what would do."""

import tomllib
from pathlib import Path

import pytest

from corolla.server.config import Config, ConfigError

ROOT = Path(__file__).parents[2]


def test_the_flower_keys_are_the_fields_and_flwr_run_runs_the_demo():
    """What [tool.flwr.app.config] declares is the demo, key by key and type by type."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{name}": value for section, fields in declared.items() for name, value in fields.items()}
    demo = Config.load(ROOT / "simulations" / "demo.toml").flat()
    assert flat == demo
    assert {k: type(v) for k, v in flat.items()} == {k: type(v) for k, v in demo.items()}
    assert demo.keys() == Config().flat().keys()


def test_flat_and_back_is_the_same():
    config = Config.load(None, ["clients.ranks=[2, 5]", "adapter.target_modules=all-linear", "train.local_epochs=0.5"])
    assert Config.from_flat(config.flat()) == config
    assert config.clients.rank(3) == 5
    assert config.train.local_steps is None
    assert config.train.steps(100) == 7


def test_toml_and_overrides(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('[run]\nrounds = 7\nseed = 3\n[adapter]\ntarget_modules = ["q_proj"]\n[clients]\nranks = "16..4"\n')
    config = Config.load(
        path, ["run.rounds=5", "aggregation.method=rbla", "clients.target_modules=[['a'], 'all-linear']"]
    )
    assert (config.run.rounds, config.run.seed, config.aggregation.method) == (5, 3, "rbla")
    assert config.adapter.target_modules == ("q_proj",)
    assert [config.clients.rank(k) for k in range(4)] == [16, 8, 4, 16]
    assert config.clients.targets(2) == ("a",)
    assert Config.from_flat(config.flat()) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.round=5", r"run\.round is no setting: did you mean run\.rounds\?"),
        ("rnu.rounds=5", r"rnu is no setting: did you mean run\?"),
        ("run.rounds=0", r"run\.rounds: .*greater than or equal to 1, got 0"),
        ("run.rounds=many", r"run\.rounds: .*integer.*got 'many'"),
        ("aggregation.method=fedavg", r"aggregation\.method: must be one of fedex, fedit, .*got 'fedavg'"),
        ("clients.ranks=big", r"clients.ranks must be a rank, a list, '32\.\.4', 'node' or 'auto', got 'big'"),
        ("clients.ranks=[4, 0]", r"clients.ranks must be at least 1"),
        ("model.dtype=int4", r"model\.dtype: .*'float32'.*got 'int4'"),
        ("train.local_steps=", r"set one of train.local_steps and train.local_epochs, got None and None"),
        ("rounds=5", r"section\.name=value, got 'rounds=5'"),
    ],
)
def test_errors_name_the_key_the_value_and_the_cure(setting, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(None, [setting])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.toml"):
        Config.load(tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("run = 3")
    with pytest.raises(ConfigError, match=r"write \[run\]"):
        Config.load(tmp_path / "broken.toml")
    (tmp_path / "broken.toml").write_text("[run")
    with pytest.raises(ConfigError, match="must be TOML"):
        Config.load(tmp_path / "broken.toml")


def test_combinations_that_cannot_be_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"'independent' needs clients that draw their own A, got .*'warm'"):
        Config.load(None, ["adapter.init=independent", "aggregation.method=warm"])
    assert Config.load(None, ["adapter.init=independent"]).adapter.init == "independent"


PRIVATE = [
    "aggregation.method=ffa",
    "aggregation.weights=uniform",
    "privacy.noise_multiplier=1.0",
    "privacy.clip_norm=0.5",
    "run.rounds=3",
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["aggregation.robust=krums"], "must be none, or of clip, cosine"),
        (["aggregation.robust=krum"], "needs byzantine, got none: set aggregation.byzantine"),
        (["aggregation.byzantine=1"], "byzantine is no option of robust = 'none'"),
        (["aggregation.robust=multi-krum", "aggregation.byzantine=1", "clients.count=4"], r"needs 2f \+ 3 = 5 clients"),
        (
            ["aggregation.robust=krum", "aggregation.byzantine=1", "clients.count=9", "run.fraction=0.4"],
            r"2f \+ 3 = 5 clients in a round, got 4",
        ),
        (["aggregation.robust=clip", "aggregation.method=rbla"], r"rbla, which averages factors"),
        (["aggregation.robust=clip", "aggregation.clip_norm=-1"], r"aggregation\.clip_norm"),
        (["aggregation.robust=clip", "aggregation.noise=true"], "counts parts of them"),
        (["privacy.clip_norm=1.0"], "need privacy.noise_multiplier, got none"),
        (["privacy.noise_multiplier=1.0"], "needs privacy.clip_norm, got none"),
        ([*PRIVATE, "aggregation.method=flora"], r"linear in what clients train, got flora"),
        ([*PRIVATE, "aggregation.method=warm"], r"linear in what clients train, got warm"),
        ([*PRIVATE, "aggregation.weights=examples"], 'privacy needs aggregation.weights = "uniform", got "examples"'),
        ([*PRIVATE, "aggregation.robust=clip"], 'aggregation.robust = "none", got "clip"'),
        ([*PRIVATE, "aggregation.noise=true"], "aggregation.noise = false, got true"),
        ([*PRIVATE, "run.keep_replies=true"], "run.keep_replies = false, got true"),
        ([*PRIVATE, "run.clients_per_round=2"], "run.clients_per_round = unset, got 2"),
        ([*PRIVATE, "run.min_replies=2"], "run.min_replies = 1, got 2"),
        ([*PRIVATE, "privacy.delta=0.25"], r"privacy\.delta must be below 1 / clients\.count = 0\.25, got 0\.25"),
        (
            [*PRIVATE, "privacy.epsilon=5"],
            r"privacy\.epsilon = 5 must cover all rounds, got 8\.385 for run\.rounds = 3",
        ),
    ],
)
def test_what_robust_and_private_runs_cannot_have(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(None, settings)


def test_a_private_run_within_its_epsilon():
    config = Config.load(None, [*PRIVATE, "privacy.epsilon=8.4", "run.fraction=0.5"])
    assert config.private().probability == 0.5
    assert Config.from_flat(config.flat()) == config
    assert Config().private() is None


def test_a_clip_norm_is_a_number_or_the_median():
    for value, wanted in (("0.5", 0.5), ("median", "median")):
        config = Config.load(None, ["aggregation.robust=clip", f"aggregation.clip_norm={value}"])
        assert config.aggregation.clip_norm == wanted
        assert Config.from_flat(config.flat()) == config


def test_the_run_of_the_privacy_page_is_one():
    text = (ROOT / "docs" / "privacy.md").read_text()
    config = Config.build(tomllib.loads(text.partition("```toml\n")[2].partition("```")[0]))
    assert 5 < config.private().epsilon(config.run.rounds) < 6
