"""Stacking equals the dense mean, for any mix of clients."""

import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from torch import nn

from corolla.aggregation import ClientUpdate, LowRankDelta, client_weights, compress_adapter, distance, stack
from corolla.aggregation.lowrank import Budget
from tests.aggregation.federations import dense, dense_mean, dense_size, difference, federations


@settings(max_examples=60, deadline=None)
@given(federations())
def test_stack_equals_the_dense_mean(federation):
    shapes, clients = federation
    updates = [update for update, _, _ in clients]
    stacked = stack(updates, client_weights(updates))
    assert difference(dense(stacked, shapes), dense_mean(shapes, clients)) <= 1e-6 * dense_size(clients)
    assert all(delta.rank == sum(u.adapter[m].rank for u in updates if m in u.adapter) for m, delta in stacked.items())


@settings(max_examples=30, deadline=None)
@given(federations(max_clients=6, max_rank=20))
def test_refactoring_the_stack_loses_nothing_and_bounds_the_rank(federation):
    shapes, clients = federation
    updates = [update for update, _, _ in clients]
    small, error = compress_adapter(stack(updates, client_weights(updates)), Budget())
    assert difference(dense(small, shapes), dense_mean(shapes, clients)) <= 1e-6 * dense_size(clients)
    assert error <= 1e-6 * dense_size(clients)
    assert all(delta.rank <= min(shapes[m]) for m, delta in small.items())


def test_a_case_to_check_by_eye():
    one = ClientUpdate("a", 1, {"q": LowRankDelta(A=torch.tensor([[1.0, 0.0]]), B=torch.tensor([[8.0]]))})
    two = ClientUpdate("b", 3, {"q": LowRankDelta(A=torch.eye(2), B=torch.tensor([[0.0, 4.0]]))})
    stacked = stack([two, one], client_weights([two, one]))
    assert torch.equal(stacked["q"].A, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))  # a before b
    assert torch.equal(stacked["q"].B, torch.tensor([[2.0, 0.0, 3.0]]))
    assert torch.equal(stacked["q"].dense(), torch.tensor([[2.0, 3.0]]))  # 1/4 * 8 and 3/4 * 4


def test_peft_cat_agrees_for_mixed_ranks_and_alphas():
    base = nn.Sequential()
    base.add_module("q", nn.Linear(24, 16, bias=False))
    ranks, alphas, counts = [2, 5, 9], [4.0, 16.0, 3.0], [10, 20, 70]
    model, names, updates = None, [], []
    for k, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q"], init_lora_weights=False)
        names.append(f"c{k}")
        if model is None:
            model = get_peft_model(base, config, adapter_name="c0")
        else:
            model.add_adapter(f"c{k}", config)
        layer = model.base_model.model.q
        a, b = (factor[f"c{k}"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
        updates.append(ClientUpdate(f"c{k}", counts[k], {"q": LowRankDelta(a, b * alpha / rank)}))
    model.add_weighted_adapter(names, [n / 100 for n in counts], "mean", combination_type="cat")
    oracle = model.base_model.model.q.get_delta_weight("mean").detach()
    ours = stack(updates, client_weights(updates))["q"].dense()
    assert (ours - oracle).norm() <= 1e-6 * oracle.norm()


def test_weights_name_what_is_wrong():
    update = ClientUpdate("a", 0, {})
    with pytest.raises(ValueError, match="positive sum"):
        client_weights([update])
    with pytest.raises(ValueError, match=r"examples, processed, uniform.*'size'"):
        client_weights([update], "size")
    with pytest.raises(ValueError, match="once"):
        client_weights([update, update])
    assert client_weights([update, ClientUpdate("b", 0, {})], "uniform") == {"a": 0.5, "b": 0.5}


def test_a_delta_refuses_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="share the rank"):
        LowRankDelta(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="bfloat16"):
        LowRankDelta(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 2))


def test_distance_sees_what_a_float32_gram_matrix_cannot():
    delta = LowRankDelta(torch.eye(4), torch.eye(4))
    nearly = LowRankDelta(torch.eye(4), (1 + 1e-5) * torch.eye(4))
    assert distance({"q": nearly}, {"q": delta}) == pytest.approx(2e-5, rel=1e-2)
