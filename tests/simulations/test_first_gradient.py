"""LoRA-SB's start: made of sketches, equal to the one from the pooled gradient, and robust to what clients send."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from corolla import simulate
from corolla.adapters import BASES
from corolla.aggregation import DenseDelta
from corolla.client import local
from corolla.client.local import Client
from corolla.client.protocol import Assignment, Order
from corolla.client.training import train_round
from corolla.server import first_gradient
from corolla.simulations.simulate import clients_of
from tests.simulations.federation import tiny_config
from tests.simulations.test_kinds import config_of, rounds


class Weights(TrainerCallback):
    """The gradient of whole weights, step by step."""

    def __init__(self, layers):
        self.layers, self.sums, self.steps = layers, {}, 0

    def on_pre_optimizer_step(self, *_, **__):
        self.steps += 1
        for module, layer in self.layers.items():
            self.sums[module] = self.sums.get(module, 0) + layer.weight.grad.double()


def pooled_gradient(config):
    """Σ p_k G_k of the first round's examples, each G_k whole: what the sketches are spared."""
    clients, total = clients_of(config), {}
    examples = {name: len(client.data.train) for name, client in clients.items()}
    for name, client in clients.items():
        base = client.base.model
        layers = {m: base.get_submodule(m) for m in client.hello().shapes}
        still = {"optimizer": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0}
        found, before = Weights(layers), [p.requires_grad for p in base.parameters()]
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        train = config.train.model_copy(update=still)
        train_round(base, client.base, train, client._examples(1), 1, 1, 0, callbacks=[found])
        for parameter, was in zip(base.parameters(), before, strict=True):
            parameter.requires_grad_(was)
            parameter.grad = None
        for module, gradient in found.sums.items():
            part = examples[name] / sum(examples.values()) * gradient / found.steps
            total[module] = total.get(module, 0) + part
    return total


def start_of(config):
    """Module -> the change that the global model begins with, and its bases."""
    strategy = simulate(config).model
    return strategy.merged


def off(config) -> float:
    """How far the start is from that of the pooled gradient, the worst module."""
    model, step = start_of(config), config.adapter.sb_step
    found = []
    for module, gradient in pooled_gradient(config).items():
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        u, s, v = u[:, :4], s[:4], v[:4]
        wanted = -step * gradient.numel() ** 0.5 * (u * (s / s.norm())) @ v
        left, right = (model[module + end].double().dense() for end in BASES)
        got = left @ model[module].double().dense() @ right
        found.append(float((got - wanted).norm() / wanted.norm()))
    return max(found)


def still(tiny_folder, tmp_path, **sections):
    """A run of one round whose training moves nothing, so that its model is the start."""
    return config_of(
        tiny_folder, tmp_path, "lora-sb", run={"rounds": 1, "evaluate": "never", "clients_per_round": 3}, **sections
    )


@pytest.fixture
def unmoved(monkeypatch):
    """Replies of nothing in round one."""
    right = Client.train

    def train(self, assignment):
        reply = right(self, assignment)
        if assignment.order.round == 0:
            return reply
        return replace(reply, adapter={m: DenseDelta(0.0 * d.dense()) for m, d in reply.adapter.items()})

    monkeypatch.setattr(Client, "train", train)


def test_the_start_is_that_of_the_pooled_gradient(tiny_folder, tmp_path, unmoved, monkeypatch):
    assert off(still(tiny_folder, tmp_path / "right")) < 1e-3
    right = first_gradient.random_matrices  # a fault: the server draws another Ψ than the clients
    monkeypatch.setattr(first_gradient, "random_matrices", lambda m, shape, rank, seed: right(m, shape, rank, seed + 1))
    assert off(still(tiny_folder, tmp_path / "wrong")) > 0.1


def test_the_base_is_left_as_it_was(tiny_folder, tmp_path):
    client = next(iter(clients_of(still(tiny_folder, tmp_path)).values()))
    before = {name: p.clone() for name, p in client.base.model.named_parameters()}
    simulate(still(tiny_folder, tmp_path))
    now = dict(client.base.model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], p) for name, p in before.items())


def spoilt(fault):
    def train(self, assignment, right=Client.train):
        reply = right(self, assignment)
        if assignment.order.round or self.client_id == "client-002":
            return reply
        return replace(reply, adapter=fault(dict(reply.adapter)))

    return train


FAULTS = {
    "not finite": lambda adapter: {m: DenseDelta(torch.nan * d.dense()) for m, d in adapter.items()},
    "a module too few": lambda adapter: dict(list(adapter.items())[1:]),
    "another width": lambda adapter: {m: DenseDelta(d.dense()[:, :-1]) for m, d in adapter.items()},
    "huge": lambda adapter: {m: DenseDelta(1e20 * torch.ones_like(d.dense())) for m, d in adapter.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sketch_that_is_not_sound_is_left_out(fault, tiny_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Client, "train", spoilt(FAULTS[fault]))
    caplog.set_level(logging.INFO, logger="flwr")
    run = simulate(still(tiny_folder, tmp_path / "run"))
    assert "round 0: reply of client-000 is quarantined" in caplog.text
    assert "from the first gradients of client-002" in caplog.text
    assert run.model.is_finite()
    assert all(line["successful"] for line in rounds(run))
    sketches = rounds(run)[0]["update"]["first_gradients"]
    assert sketches["bytes_up"].keys() == {"client-002"}
    assert sketches["quarantined"].keys() == {"client-000", "client-001"}


def test_too_few_sound_sketches_end_the_run_with_the_reasons(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "train", spoilt(FAULTS["not finite"]))
    config = config_of(tiny_folder, tmp_path, "lora-sb", run={"rounds": 1, "min_replies": 2})
    with pytest.raises(RuntimeError, match=r"first gradients of 2 clients, got 1 sound ones \(client-000: .* finite"):
        simulate(config)


def test_a_sketch_too_large_for_a_message_is_not_asked_for(tiny_folder, tmp_path):
    config = config_of(tiny_folder, tmp_path, "lora-sb", run={"rounds": 1, "largest_message": 1e-6})
    with pytest.raises(RuntimeError, match=r"got 0 sound ones \(client-000: a message must have at most run\.largest"):
        simulate(config)


def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_start_is_the_same(
    tiny_folder, tmp_path, monkeypatch, unmoved
):
    right, batches = local.sketch_first_gradient, []

    def sketch(base, spec, shapes, rank, seed, config, examples):
        batches.append(config.batch_size)
        if config.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(base, spec, shapes, rank, seed, config, examples)

    monkeypatch.setattr(local, "sketch_first_gradient", sketch)
    assert off(still(tiny_folder, tmp_path / "run")) < 1e-3
    assert batches == [4, 2, 1] * 3


def test_a_client_of_another_kind_gives_no_gradient(tiny_folder, tmp_path):
    client = next(iter(clients_of(tiny_config(tiny_folder, tmp_path)).values()))
    order = Order(0, 4, "W", 0, 0, "m", "s", client.base.hash)
    with pytest.raises(ValueError, match=r"got adapter\.kind = 'lora', which needs none: this client gives none"):
        client.train(Assignment(order, {}, {}))
