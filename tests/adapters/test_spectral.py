"""SVFit and LoLDU: bases that machines agree on, and layers, weights and pivots out of the ordinary."""

import copy
import gc
import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from corolla.adapters import KINDS, AdapterSpec, kind_shapes, on_weights
from corolla.adapters.carry import added
from corolla.adapters.kinds import attach, spectral
from corolla.adapters.kinds.spectral import portable
from corolla.adapters.kinds.svfit import canonical
from corolla.aggregation import DenseDelta

NAMES = ["loldu", "svfit"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec_of(name: str, rank: int = 4, targets=("q_proj", "v_proj"), **options) -> AdapterSpec:
    return AdapterSpec(rank, 2.0 * rank, targets, kind=name, **options)


class One(nn.Module):
    """A model of one module, named `linear`."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def numpys_svd(weight, rank, dtype):
    u, sigma, vh = np.linalg.svd(weight.numpy().astype(dtype), full_matrices=False)
    return (*(torch.from_numpy(part.copy()) for part in (u[:, :rank], vh[:rank])), torch.from_numpy(sigma))


def test_svd_bases_of_two_lapacks_are_bit_equal():
    for seed in range(5):
        weight = random(96, 64, seed=seed)
        u, vh, _ = numpys_svd(weight, 24, np.float64)
        found = KINDS["svfit"].bases(weight, 24)
        for ours, theirs in zip(found, canonical(u, vh), strict=True):
            assert torch.equal(portable(ours), portable(theirs))


def test_lu_bases_of_two_lapacks_are_bit_equal():
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(5):
        weight = random(64, 96, seed=seed)
        p, lower, upper = linalg.lu(weight.numpy())
        left, right = KINDS["loldu"].bases(weight, 24)
        assert torch.equal(portable(left), portable(torch.from_numpy((p @ lower)[:, :24])))
        assert torch.equal(portable(right), portable(torch.from_numpy((upper / np.diag(upper)[:, None])[:24])))


def test_float32_and_float64_agree_on_components_that_are_well_apart():
    weight = random(96, 64)
    u, vh, sigma = numpys_svd(weight, 32, np.float32)
    apart = (-sigma.diff() / sigma[0])[:32] > 1e-2
    apart[1:] &= apart[:-1].clone()  # from the one before as well
    assert apart.sum() >= 5
    left, right = KINDS["svfit"].bases(weight, 32)
    narrow, wide = canonical(u, vh)
    assert (left[:, apart] - narrow[:, apart]).abs().max() < 1e-4
    assert (right[apart] - wide[apart]).abs().max() < 1e-4


def test_signs_do_not_depend_on_those_that_a_lapack_chose():
    u, vh, _ = numpys_svd(random(32, 48), 8, np.float64)
    flips = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    for one, other in zip(canonical(u, vh), canonical(u * flips, vh * flips[:, None]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_bases_and_the_weights_own_diagonal_are_the_weight(shape):
    weight = random(*shape)
    left, right = KINDS["svfit"].bases(weight, 16)
    assert torch.allclose(left * torch.linalg.svdvals(weight) @ right, weight)
    left, right = KINDS["loldu"].bases(weight, 16)
    pivots = torch.linalg.lu(weight).U.diagonal()
    assert torch.allclose(left * pivots @ right, weight)


def test_a_tiny_pivot_leaves_its_component_out():
    weight = random(12, 12)
    weight[:, 3] = 0.0
    weight[:, 6] = weight[:, 5] + 1e-9 * random(12)
    left, right = KINDS["loldu"].bases(weight, 9)
    assert [j for j in range(9) if not right[j].any()] == [3, 6] == [j for j in range(9) if not left[:, j].any()]
    assert right.isfinite().all()
    assert right.abs().max() <= 1000


def test_components_that_the_weight_does_not_have_are_left_out():
    weight = random(16, 3) @ random(3, 12)
    for name in NAMES:
        left, right = KINDS[name].bases(weight, 6)
        assert [bool(row.any()) for row in right] == [True] * 3 + [False] * 3
        assert not left[:, 3:].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_tells_another_base_and_another_precision(name, tiny):
    def digest(model):
        return kind_shapes(model, KINDS[name], spec_of(name))[1]

    other, half = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model).to(torch.bfloat16)
    assert digest(other) == digest(tiny.model) != ""
    changed = copy.deepcopy(tiny.model)
    changed.model.layers[1].self_attn.q_proj.weight.data[0] += 0.01
    assert len({digest(tiny.model), digest(changed), digest(half)}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_bases_are_found_once_a_module_and_go_with_it(name, monkeypatch):
    calls = []
    right = type(KINDS[name]).bases
    monkeypatch.setattr(type(KINDS[name]), "bases", lambda *given: calls.append(given[2]) or right(*given))
    gc.collect()
    model, known = One(nn.Linear(12, 16)), len(spectral._found)
    for rank in (3, 3, 5, 5):
        assert kind_shapes(model, KINDS[name], spec_of(name, rank, ("linear",)))[0] == {"linear": (rank, 1)}
    assert calls == [3, 5]
    assert len(spectral._found) == known + 1
    del model
    gc.collect()
    assert len(spectral._found) == known


@pytest.mark.parametrize("name", NAMES)
def test_a_module_narrower_than_the_rank_has_its_narrow_side(name, tiny):
    shapes, _ = kind_shapes(tiny.model, KINDS[name], spec_of(name, 20))
    assert {m.rpartition(".")[2]: shape for m, shape in shapes.items()} == {"q_proj": (20, 1), "v_proj": (16, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_a_conv1d_is_a_linear_module_turned_around(name):
    plain, turned = nn.Linear(12, 16), Conv1D(16, 12)
    turned.weight.data, turned.bias.data = plain.weight.data.T.clone(), plain.bias.data.clone()
    outputs, x = [], random(2, 12).float()
    for model in (One(plain), One(turned)):
        with attach(model, KINDS[name], spec_of(name, 3, ("linear",))) as (whole, layers):
            KINDS[name].load(layers["linear"], DenseDelta(torch.tensor([[1.0], [-2.0], [3.0]])))
            outputs.append(whole(x))
            layers["linear"].merge(safe_merge=True)
            assert torch.allclose(whole(x), outputs[-1], atol=1e-5)
            layers["linear"].unmerge()
            assert torch.allclose(whole(x), outputs[-1], atol=1e-5)
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], plain(x), atol=1e-2)


def test_what_is_no_linear_module_is_refused_and_the_base_put_back(tiny):
    before = [type(module) for module in tiny.model.modules()]
    with pytest.raises(ValueError, match=r"needs linear modules, got Embedding at model\.embed_tokens"):
        kind_shapes(tiny.model, KINDS["svfit"], spec_of("svfit", targets=("embed_tokens", "q_proj")))
    assert [type(module) for module in tiny.model.modules()] == before


def test_a_weight_that_cannot_be_dequantised_is_refused():
    linear = nn.Linear(12, 16)
    linear.weight = nn.Parameter(torch.ones(16, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got torch\.int8 at linear.*set model\.quantization = 'none'"):
        kind_shapes(One(linear), KINDS["loldu"], spec_of("loldu", targets=("linear",)))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_weight_is_dequantised_for_its_basis(name):
    import bitsandbytes as bnb

    plain = nn.Linear(64, 64, bias=False)
    quantised = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    quantised.load_state_dict(plain.state_dict())
    whole = One(quantised.to("cpu"))
    held = bnb.functional.dequantize_4bit(whole.linear.weight.data, whole.linear.weight.quant_state)
    spec, c = spec_of(name, 4, ("linear",)), DenseDelta(torch.tensor([[1.0], [-2.0], [3.0], [0.5]]))
    change = added(on_weights(whole, spec, {"linear": c})["linear"], held)
    expected = One(nn.Linear(64, 64, bias=False))
    expected.linear.weight.data = held.clone()
    assert torch.equal(change, added(on_weights(expected, spec, {"linear": c})["linear"], held))
    x = random(2, 64).float()
    with attach(whole, KINDS[name], spec) as (model, layers):
        KINDS[name].load(layers["linear"], c)
        wanted = expected(x) + x @ change.float().T
        assert torch.allclose(model(x), wanted, atol=1e-4)
        with pytest.raises(ValueError, match="merging needs a weight in floating point"):
            layers["linear"].merge(safe_merge=True)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device_the_shapes_are_known(name):
    with torch.device("meta"):
        model = One(nn.Linear(12, 16))
    with attach(model, KINDS[name], spec_of(name, 20, ("linear",))) as (_, layers):
        assert KINDS[name].shape(layers["linear"]) == (12, 1)
