"""A loop of one's own: what it gets, what is refused, and that its model stays as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from corolla.adapters import AdapterSpec
from corolla.aggregation import GlobalModel, build_method, distance, share
from corolla.client.loop import OwnLoop, own_loop, weights_hash
from corolla.client.protocol import Assignment, Order, share_digest
from corolla.server.strategy import FederatedLoRA
from corolla.simulations.grid import InProcessGrid


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)


def train(model, data, round):
    """Ten steps of plain gradient descent on whatever takes gradients."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(10):
        loss = nn.functional.mse_loss(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"train_loss": loss.item(), "round": round}


def site(rank=2, **changes) -> OwnLoop:
    data = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.ones(16, 2)
    return replace(OwnLoop("a", network(), data, AdapterSpec(rank, 4.0, "all-linear"), 16, train), **changes)


def order_for(client: OwnLoop, **changes) -> Assignment:
    part = share(GlobalModel(), build_method("flora").constrain(1), client.spec.rank, client.hello().shapes)
    values = {"round": 3, "rank": client.spec.rank, "trains": "AB", "fresh_round": 1, "seed": 0, "model": "m"}
    values |= {"share": share_digest(part.frozen, part.start), "base_hash": client.hello().base_hash}
    return Assignment(Order(**(values | changes)), part.frozen, part.start)


def test_the_reply_is_what_the_loop_made_of_the_attached_adapter():
    client = site()
    before = weights_hash(client.model)
    reply = client.reply(order_for(client))
    assert reply.metrics["round"] == 3
    assert set(reply.adapter) == {"0", "2"}
    assert {delta.rank for delta in reply.adapter.values()} == {2}
    assert distance(reply.adapter, {}) > 1e-4
    assert weights_hash(client.model) == before
    assert not any("lora" in name for name, _ in client.model.named_parameters())


def test_the_hash_of_a_base_is_that_of_its_values():
    model, other = network(), network()
    assert weights_hash(model) == weights_hash(other)
    other[0].weight[0, 0] += 1e-6
    assert weights_hash(model) != weights_hash(other)
    assert weights_hash(network().bfloat16()) != weights_hash(model)


def test_another_base_and_a_missing_evaluation_are_refused_by_name():
    with pytest.raises(ValueError, match=r"the order is for the base x, got v2 at a: use the same weights"):
        site(base="v2").reply(order_for(site(base="v2"), base_hash="x"))
    with pytest.raises(ValueError, match=r"got none at a: give OwnLoop\(evaluate=…\)"):
        site().metrics(order_for(site()))


def test_as_a_flower_app_it_learns_under_a_method_with_a_common_start():
    ranks, records, losses = (2, 3), [], []

    def evaluate(model, data):
        return {"loss": nn.functional.mse_loss(model(data[0]), data[1]).item()}

    def open_site(context):
        number = int(context.node_config["partition-id"])
        return site(ranks[number], client_id=f"site-{number}", evaluate=evaluate)

    strategy = FederatedLoRA(
        "zero-padding",
        clients=2,
        on_round=lambda record, *rest: records.append(record),
        on_evaluation=lambda number, found, failed: losses.append((found, failed)),
    )
    strategy.run(InProcessGrid(own_loop(open_site), [{"partition-id": k} for k in range(2)], {}), 4)
    assert [record.successful for record in records] == [True] * 4
    assert not any(failed for _, failed in losses)
    assert losses[-1][0]["site-0"]["loss"] < losses[0][0]["site-0"]["loss"] - 0.05


def test_a_network_of_convolutions_is_federated_by_its_own_loop():
    """Conv1d, Conv2d and Conv3d, and two clients of different ranks; the stack is exact, and training helps."""
    records, losses = [], []

    def convolutions():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(1, 4, 2, stride=2), nn.Flatten(2, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(2),
            nn.Conv1d(4, 6, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2),
        ).requires_grad_(False)  # fmt: skip

    def open_site(context):
        number = int(context.node_config["partition-id"])
        data = torch.randn(8, 1, 4, 4, 4, generator=torch.Generator().manual_seed(number)), torch.ones(8, 2)
        spec = AdapterSpec(2 + number, 4.0, ("0", "2", "5", "8"))
        own = {"data": data, "evaluate": evaluate, "model": convolutions(), "spec": spec}
        return site(client_id=f"site-{number}", **own)

    def evaluate(model, data):
        return {"loss": nn.functional.mse_loss(model(data[0]), data[1]).item()}

    strategy = FederatedLoRA(
        "flora",
        clients=2,
        evaluate="each",
        on_round=lambda record, *rest: records.append(record),
        on_evaluation=lambda number, found, failed: losses.append(sum(x["loss"] for x in found.values())),
    )
    strategy.run(InProcessGrid(own_loop(open_site), [{"partition-id": k} for k in range(2)], {}), 2)
    assert [record.update["certificate"]["exact"] for record in records] == [True, True]
    assert set(strategy.model.merged) == {"0", "2", "5", "8"}
    assert strategy.model.merged["0"].shape == (4, 8)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("kind", ["dylora", "sora", "pissa", "dora"])
def test_a_kind_that_needs_more_than_its_parameters_trained_is_refused(kind):
    spec = AdapterSpec(2, 4.0, ("layer",), kind=kind)
    with pytest.raises(ValueError, match=f"trains an adapter of kind lora, rslora, allora, got '{kind}'"):
        OwnLoop("a", torch.nn.Linear(2, 2), None, spec, 1, lambda model, data, round: {})
