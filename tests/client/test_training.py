"""Local training: the schedule over the run, the examples of the round, the base untouched."""

from dataclasses import replace

import pytest
import torch

from corolla.adapters import AdapterSpec, attached, read_adapter, target_shapes
from corolla.aggregation import FreshRows, distance, fill_adapter
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.evaluation import answer_all, mean_loss
from corolla.client.tasks import causal_lm
from corolla.client.tasks.causal_lm import encode
from corolla.client.training import train_round
from tests.adapters.test_lora import assert_untouched, random_adapter, state_of
from tests.simulations.federation import tiny_config

SPEC = AdapterSpec(4, 8.0, "all-linear")


def examples(tiny, count):
    rows = [{"prompt": f"Count to {i}", "completion": f"{i} is it"} for i in range(count)]
    return [encode(tiny.tokenizer, DataConfig(), row) for row in rows]


def train(tiny, config, rows, round_number=1, rounds=1, start=None, frozen=None, seed=0):
    shapes = target_shapes(tiny.model, SPEC)
    start = start or fill_adapter({}, shapes, 4, FreshRows(0))
    with attached(tiny.model, SPEC, start, frozen) as model:
        metrics = train_round(model, tiny, config, rows, round_number, rounds, seed)
        return read_adapter(model), metrics


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_of_the_rounds_is_the_schedule_of_the_run(tiny, schedule, monkeypatch):
    """Learning rates seen by the optimizer in three rounds of two steps equal those of one training of six."""
    seen: list[float] = []

    class Recording(causal_lm.CausalTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(causal_lm, "TASK", replace(causal_lm.TASK, trainer=Recording))
    config = TrainConfig(local_steps=2, batch_size=2, learning_rate=1e-3, schedule=schedule, warmup_ratio=0.34)
    rows = examples(tiny, 12)
    train(tiny, config, rows)
    whole = seen.copy()
    seen.clear()
    for round_number in (1, 2, 3):
        train(tiny, config, rows[:4], round_number, rounds=3)
    assert seen == pytest.approx(whole)
    assert len(set(whole)) > 2


def test_a_trainer_leaves_nothing_behind_in_the_base(tiny):
    """TRL wraps the base's forward at every training: unless it is taken off, the thousandth round recurses too deep."""
    before, forward = set(tiny.model.__dict__), tiny.model.forward
    for _ in range(2):
        train(tiny, TrainConfig(local_steps=1, batch_size=2), examples(tiny, 2))
        assert set(tiny.model.__dict__) == before
        assert tiny.model.forward == forward
    assert not tiny.model.training


def test_training_learns_and_leaves_base_and_frozen_part_alone(tiny):
    before = state_of(tiny.model)
    frozen = random_adapter(target_shapes(tiny.model, SPEC), 3)
    config = TrainConfig(local_steps=8, batch_size=4, learning_rate=2e-2)
    rows = examples(tiny, 32)
    shapes = target_shapes(tiny.model, SPEC)
    with attached(tiny.model, SPEC, fill_adapter({}, shapes, 4, FreshRows(0)), frozen) as model:
        first = mean_loss(model, tiny, rows)
        metrics = train_round(model, tiny, config, rows, 1, 1, 0)
        assert mean_loss(model, tiny, rows) < first - 0.1
        assert distance(read_adapter(model, "merged"), frozen) < 1e-12
    assert metrics["steps"] == 8
    assert metrics["tokens"] == sum(len(e.input_ids) for e in rows)
    assert_untouched(tiny.model, before)


def test_the_same_seed_trains_the_same_with_dropout_and_whatever_was_drawn_before(tiny):
    spec = AdapterSpec(4, 8.0, "all-linear", dropout=0.3)
    config = TrainConfig(local_steps=2, batch_size=2)
    results = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.rand(noise)
        with attached(tiny.model, spec, fill_adapter({}, target_shapes(tiny.model, spec), 4, FreshRows(0))) as model:
            train_round(model, tiny, config, examples(tiny, 4), 1, 1, seed)
            results.append(read_adapter(model))
    assert distance(results[0], results[1]) == distance(results[0], results[0])
    assert distance(results[0], results[2]) > 1e-6


def test_a_loss_that_is_not_finite_is_an_error_not_a_reply(tiny):
    start = fill_adapter({}, target_shapes(tiny.model, SPEC), 4, FreshRows(0))
    broken = {m: type(d)(d.A * 1e30, d.B + 1e30) for m, d in start.items()}
    config = TrainConfig(local_steps=1, batch_size=2)
    with attached(tiny.model, SPEC, broken) as model, pytest.raises(RuntimeError, match="finite loss"):
        train_round(model, tiny, config, examples(tiny, 2), 1, 1, 0)


def test_loss_is_of_the_answer_alone_and_does_not_depend_on_padding(tiny):
    rows = [*examples(tiny, 3), encode(tiny.tokenizer, DataConfig(), {"prompt": "x" * 90, "completion": "y"})]
    alone = [mean_loss(tiny.model, tiny, [row]) * (len(row.input_ids) - len(row.prompt_ids)) for row in rows]
    counts = sum(len(row.input_ids) - len(row.prompt_ids) for row in rows)
    assert mean_loss(tiny.model, tiny, rows) == pytest.approx(sum(alone) / counts, rel=1e-5)
    ids = torch.tensor([rows[0].input_ids])
    expected = tiny.model(ids, labels=torch.tensor([rows[0].labels])).loss.item()
    assert mean_loss(tiny.model, tiny, rows[:1]) == pytest.approx(expected, rel=1e-5)


def test_greedy_answers_equal_those_of_plain_transformers(tiny):
    rows = examples(tiny, 5)
    found = answer_all(tiny.model, tiny, rows, 6)
    for example, answer in zip(rows, found.answers, strict=True):
        ids = torch.tensor([example.prompt_ids])
        output = tiny.model.generate(ids, do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(ids))
        assert answer == tiny.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="held-out examples, got none"):
        answer_all(tiny.model, tiny, [], 6)


def test_exact_match_by_group(tiny, monkeypatch):
    from corolla.client import evaluation

    rows = [
        encode(tiny.tokenizer, DataConfig(), {"prompt": c, "completion": c, "group": f}) for c, f in ("ax", "by", "cy")
    ]
    monkeypatch.setattr(evaluation, "_answer", lambda *args: ["a", " b ", "wrong"])
    metrics = answer_all(tiny.model, tiny, rows, 3).metrics()
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert (metrics["exact_match/x"], metrics["exact_match/y"], metrics["examples/y"]) == (1.0, 0.5, 2.0)


def test_clients_see_other_examples_each_round(tiny_folder, tmp_path):
    from corolla.simulations.simulate import clients_of

    client = clients_of(tiny_config(tiny_folder, tmp_path))["client-001"]
    rounds = [[e.prompt for e in client._examples(r)] for r in (1, 2)]
    assert not set(rounds[0]) & set(rounds[1])
