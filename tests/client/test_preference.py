"""Preference tuning: the reference is the base, and a federation learns what is preferred."""

import json
import math

import pytest
import torch

from corolla.adapters import AdapterSpec, attached, read_adapter, target_shapes
from corolla.aggregation import FreshRows, distance, fill_adapter
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.evaluation import answer_log_probs
from corolla.client.tasks import find_task
from corolla.client.training import train_round
from corolla.simulations import simulate as simulation
from tests.adapters.test_lora import assert_untouched, random_adapter, state_of
from tests.simulations.federation import tiny_config

SPEC = AdapterSpec(4, 8.0, "all-linear")
TASK = find_task("preference")


def pairs(tiny, count=16):
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}, please", "rejected": f"{i}!"} for i in range(count)]
    return [TASK.encode(tiny.tokenizer, DataConfig(), row) for row in rows]


def start(tiny):
    return fill_adapter({}, target_shapes(tiny.model, SPEC), 4, FreshRows(0))


def test_the_base_prefers_nothing(tiny):
    found = TASK.evaluate(tiny.model, tiny, pairs(tiny), DataConfig())
    assert found["preference_accuracy"] == 0.5
    assert found["held_out_loss"] == pytest.approx(math.log(2))


def test_the_margin_counts_from_the_base_even_beside_a_frozen_adapter(tiny):
    examples, frozen = pairs(tiny, 3), random_adapter(target_shapes(tiny.model, SPEC), 3)
    plain = {
        name: answer_log_probs(tiny.model, tiny, [getattr(e, name) for e in examples])
        for name in ("chosen", "rejected")
    }
    with attached(tiny.model, SPEC, start(tiny), frozen) as model:
        grads = [p.requires_grad for p in model.parameters()]
        rows = TASK.rows(model, tiny, examples)
        assert [p.requires_grad for p in model.parameters()] == grads
        tuned = answer_log_probs(model, tiny, [e.chosen for e in examples])
    assert [row["ref_chosen_logps"] for row in rows] == pytest.approx(plain["chosen"], abs=1e-5)
    assert [row["ref_rejected_logps"] for row in rows] == pytest.approx(plain["rejected"], abs=1e-5)
    assert tuned != pytest.approx(plain["chosen"], abs=1e-3)


def test_training_raises_the_margin_and_touches_neither_base_nor_frozen_part(tiny):
    before, frozen = state_of(tiny.model), random_adapter(target_shapes(tiny.model, SPEC), 3)
    config = TrainConfig(task="preference", local_steps=6, batch_size=4, learning_rate=1e-2, beta=0.5)
    examples = pairs(tiny, 24)
    with attached(tiny.model, SPEC, start(tiny), frozen) as model:
        first = TASK.evaluate(model, tiny, examples, DataConfig())
        metrics = train_round(model, tiny, config, examples, 1, 1, 0)
        last = TASK.evaluate(model, tiny, examples, DataConfig())
        assert distance(read_adapter(model, "merged"), frozen) < 1e-12
    assert last["margin"] > first["margin"] + 1
    assert metrics["steps"] == 6
    assert_untouched(tiny.model, before)


def test_dpo_by_hand_gives_the_same_gradient_step(tiny):
    """One SGD step of TRL's trainer against −log σ(β(Δchosen − Δrejected)) written out."""
    examples = pairs(tiny, 4)
    config = TrainConfig(
        task="preference", local_steps=1, batch_size=4, learning_rate=0.5, schedule="constant", optimizer="sgd",
        max_grad_norm=1e9, beta=0.3,
    )  # fmt: skip
    shapes = target_shapes(tiny.model, SPEC)
    begin = random_adapter(shapes, 4)
    with attached(tiny.model, SPEC, begin) as model:
        train_round(model, tiny, config, examples, 1, 1, 0)
        trained = read_adapter(model)
    with attached(tiny.model, SPEC, begin) as model:
        rows = TASK.rows(model, tiny, examples)
        margins = []
        for row in rows:
            sides = []
            for name in ("chosen", "rejected"):
                ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
                given = len(row["prompt_ids"])
                logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                total = logs.gather(1, ids[0, 1:, None])[given - 1 :].sum()
                sides.append(total - row[f"ref_{name}_logps"])
            margins.append(sides[0] - sides[1])
        loss = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
        by_hand = read_adapter(model)
    moved = distance(trained, begin)
    assert moved > 1e-4
    assert distance(trained, by_hand) < 1e-3 * moved


def test_a_federation_learns_what_is_preferred(tiny_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}, please", "rejected": f"{i}!"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tiny_folder, tmp_path / "run",
        data={"train": str(path), "partition": "iid", "held_out_fraction": 0.2},
        train={"task": "preference", "local_steps": 4, "learning_rate": 1e-2},
    )  # fmt: skip
    run = simulation.simulate(config)
    first, last = (line["clients"] for line in run.metrics if line["kind"] == "evaluation")
    assert all(client["preference_accuracy"] == 0.5 for client in first.values())
    assert all(client["preference_accuracy"] > 0.8 for client in last.values())
