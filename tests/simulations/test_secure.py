"""Secure sums the whole way, by the ClientApp that is deployed, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from corolla import simulate
from corolla.client.app import app as client_app
from corolla.server.config import ConfigError
from corolla.server.folder import RunFolder
from corolla.server.run import prepare_folder, run_server
from corolla.simulations.grid import InProcessGrid
from corolla.simulations.simulate import nodes
from tests.aggregation.federations import dense, difference
from tests.simulations.federation import tiny_config

SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in (0, 1)
    for name, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.up_proj": (48, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
MIXED = {"count": 3, "ranks": (6, 4, 2), "target_modules": (("q_proj",), ("v_proj", "up_proj"), "all-linear")}


@pytest.mark.parametrize("method", ["flora", "warm"])
def test_a_secure_run_is_the_run_in_the_clear(tiny_folder, tmp_path, method):
    sections = {"clients": MIXED, "aggregation": {"method": method, "download_error": 0.0}}
    plain = simulate(tiny_config(tiny_folder, tmp_path / "plain", **sections))
    secure = simulate(tiny_config(tiny_folder, tmp_path / "secure", secure={"sums": True}, **sections))
    one, other = dense(plain.adapter, SHAPES), dense(secure.adapter, SHAPES)
    size = sum(float(m.square().sum()) for m in one.values()) ** 0.5
    assert size > 0.01
    assert difference(one, other) < 1e-4 * size  # two rounds: training enlarges what rounding began
    for line, clear in zip(secure.metrics, plain.metrics, strict=True):
        if line["kind"] != "round":
            continue
        assert line["update"]["certificate"]["exact"], line["update"]["certificate"]
        facts = line["update"]["secure"]
        assert facts["quantisation_error"] < 1e-7 * line["update"]["norm"]
        assert line["received_loss"] == pytest.approx(clear["received_loss"], rel=1e-4)
        assert all(client["bytes_up"] > 0 for client in line["clients"].values())
    assert (secure.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_the_first_round_is_the_one_in_the_clear_to_rounding(tiny_folder, tmp_path):
    sections = {"clients": MIXED, "run": {"rounds": 1, "evaluate": "never"}}
    plain = simulate(tiny_config(tiny_folder, tmp_path / "plain", **sections))
    secure = simulate(tiny_config(tiny_folder, tmp_path / "secure", secure={"sums": True}, **sections))
    one, other = dense(plain.adapter, SHAPES), dense(secure.adapter, SHAPES)
    assert difference(one, other) < 1e-6 * sum(float(m.square().sum()) for m in one.values()) ** 0.5


def test_a_node_for_secure_sums_alone_refuses_an_order_in_the_clear(tiny_folder, tmp_path):
    config = tiny_config(tiny_folder, tmp_path / "run", run={"rounds": 1, "evaluate": "never"})
    folder = prepare_folder(config)
    grid = InProcessGrid(client_app, [{**node, "secure": True} for node in nodes(config)], config.flat())
    with pytest.raises(RuntimeError, match="no round of 1 succeeded"):
        run_server(grid, config, folder)
    reasons = folder.lines()[0]["quarantined"]
    assert len(reasons) == 3
    assert all("secure sums alone, got an order for an adapter in the clear" in why for why in reasons.values())


def test_nothing_of_a_client_reaches_the_disk(tiny_folder, tmp_path):
    run = simulate(tiny_config(tiny_folder, tmp_path / "run", secure={"sums": True}, run={"evaluate": "never"}))
    files = {path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()}
    assert not any("repl" in str(path) or "client" in str(path) for path in files), files
    text = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["update"]["secure"]["clients"]
    model = RunFolder.open(run.folder).load().model
    assert max(delta.rank for delta in model.merged.values()) > 6  # a sum: more than any client's rank


def test_a_classifiers_head_is_summed_under_masks(tmp_path):
    from tests.tiny import write_tiny_bert

    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{word} number {i}", "label": label, "site": i % 3} for i in range(36)
            for word, label in (("good", "yes"), ("bad", "no"))]  # fmt: skip
    data.write_text("\n".join(json.dumps(row) for row in rows))
    sections = {
        "data": {"train": str(data), "labels": ("no", "yes"), "partition_column": "site", "max_new_tokens": 0},
        "adapter": {"target_modules": ("query", "value")},
        "train": {"task": "classification"},
    }
    base = write_tiny_bert(tmp_path / "bert")
    plain = simulate(tiny_config(base, tmp_path / "plain", run={"rounds": 1, "evaluate": "never"}, **sections))
    secure = simulate(
        tiny_config(base, tmp_path / "s", run={"rounds": 1, "evaluate": "never"}, secure={"sums": True}, **sections)
    )
    heads = [m for m, d in plain.model.merged.items() if set(d.tensors()) == {"W"}]
    assert heads
    for module, delta in plain.model.merged.items():
        other = secure.model.merged[module].double().dense()
        assert torch.linalg.norm(delta.double().dense() - other) < 1e-5 * torch.linalg.norm(delta.double().dense())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"aggregation": {"method": "rbla"}}, "got method 'rbla', which needs every client's factors"),
        ({"aggregation": {"noise": True}}, r"got aggregation\.noise, which compares methods on every client's reply"),
        ({"run": {"keep_replies": True}}, r"got run\.keep_replies, which keeps every client's reply"),
        ({"run": {"clients_per_round": 2}}, "at least 3 clients a round, got 2"),
        ({"secure": {"sums": True, "threshold": 0.5}}, r"secure\.threshold: .*greater than 0\.5"),
        ({"secure": {"sums": True, "bits": 16}}, r"secure\.bits"),
    ],
)
def test_what_does_not_go_with_secure_sums_is_refused_at_configuration(sections, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(Path("m"), Path("o"), **({"secure": {"sums": True}} | sections))


def test_robust_rules_are_refused():
    with pytest.raises(ValueError, match=r"got aggregation\.robust, which judges every client's change"):
        tiny_config(Path("m"), Path("o"), secure={"sums": True}, aggregation={"robust": "cosine"})
