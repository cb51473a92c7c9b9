"""Two laws that every kind of adapter must keep, on a real PEFT model, and that a fault in it breaks."""

import pytest
import torch

from corolla.adapters import BASES, KINDS, AdapterSpec, carrying, kind_shapes, on_weights, target_shapes, train_kind
from corolla.adapters.carry import added
from corolla.adapters.kinds import attach
from corolla.adapters.kinds.kind import split
from corolla.aggregation import ClientUpdate, DenseDelta, FreshRows, GlobalModel, advance, after, build_method

EXACT = [name for name, kind in KINDS.items() if not kind.inexact]
RANK = 4
PROBE = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))


def spec_of(name: str) -> AdapterSpec:
    return AdapterSpec(RANK, 2.0 * RANK, ("q_proj", "v_proj"), kind=name, seed=3)


def begun(base, name: str):
    """What the global model is before round one: nothing, but for a kind whose bases are the server's."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(4)
    if not kind.shipped:
        return {}
    found = {}
    for module, shape in target_shapes(base, AdapterSpec(RANK, 2.0 * RANK, ("q_proj", "v_proj"))).items():
        for end, side in zip(BASES, shape, strict=True):
            q = torch.linalg.qr(torch.randn(side, RANK, generator=generator)).Q
            found[module + end] = DenseDelta(q.contiguous() if end == BASES[0] else q.T.contiguous())
        found[module] = DenseDelta(0.1 * torch.eye(RANK))
    return found


def trained(base, name: str, frozen, seed: int):
    """The change that a client makes on top of `frozen`, and the logits that it then has."""
    with train_kind(base, KINDS[name], spec_of(name), frozen, FreshRows(0)) as (model, read):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            return read(), model.eval()(input_ids=PROBE).logits


def dense(base, name: str, adapter):
    """What coordinates change of each weight, in float64."""
    flat = on_weights(base, spec_of(name), adapter)
    return {module: added(delta, base.get_submodule(module).weight.detach()) for module, delta in flat.items()}


def apart(one, other) -> float:
    """The largest relative difference of any module."""
    assert one.keys() == other.keys()
    return max(float((one[m] - other[m]).norm() / other[m].norm()) for m in other)


def combined_is_the_mean(base, name: str) -> float:
    """How far dense(combine(deltas)) is from Σ w_k dense(delta_k), on top of a round that came before."""
    method, model = build_method("flora"), GlobalModel(merged=begun(base, name))
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    for round_number in (1, 2):
        before = model.merged
        found = [trained(base, name, before, 10 * round_number + k)[0] for k in range(3)]
        updates = [ClientUpdate(client, 1, delta) for client, delta in zip(weights, found, strict=True)]
        outcome = method.aggregate(updates, weights, model)
        assert outcome.certificate.exact, outcome.certificate.reason
        model, _ = advance(model, outcome)
    start = dense(base, name, before)
    changes = [dense(base, name, after(before, update.adapter)) for update in updates]
    wanted = {m: sum(w * (c[m] - start[m]) for w, c in zip(weights.values(), changes, strict=True)) for m in start}
    got = dense(base, name, model.merged)
    return apart({m: got[m] - start[m] for m in got}, wanted)


def read_is_what_was_trained(base, name: str) -> float:
    """How far the logits of base + dense(delta) are from those of the trained PEFT model, over two rounds."""
    worst, frozen = 0.0, begun(base, name)
    for seed in (1, 2):
        change, logits = trained(base, name, frozen, seed)
        frozen = after(frozen, change)
        with carrying(base, on_weights(base, spec_of(name), frozen)) as model, torch.no_grad():
            found = model(input_ids=PROBE).logits
        worst = max(worst, float((found - logits).norm() / logits.norm()))
    return worst


@pytest.fixture
def whole(tiny):
    """The tiny model; afterwards it must be what it was."""
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    yield tiny.model
    now = dict(tiny.model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("name", KINDS)
def test_the_rule_gives_the_mean_of_the_changes_or_says_that_it_does_not(name, whole):
    apart = combined_is_the_mean(whole, name)
    assert apart < 1e-6 if name in EXACT else apart > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_the_model_computes(name, whole):
    assert read_is_what_was_trained(whole, name) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_peft_merges(name, whole):
    kind, spec = KINDS[name], spec_of(name)
    weights = {}
    with attach(whole, kind, spec, split(kind, begun(whole, name))[1]) as (_, layers):
        for seed, (module, layer) in enumerate(sorted(layers.items())):
            kind.begin(layer, module, FreshRows(0))
            generator = torch.Generator().manual_seed(seed)
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        found = {m: kind.unfold(layer, kind.read(layer)) for m, layer in layers.items()}
        before = {m: layer.get_base_layer().weight.detach().clone() for m, layer in layers.items()}
        for module, layer in layers.items():
            layer.merge(safe_merge=True)
            weights[module] = layer.get_base_layer().weight.detach().clone()
            layer.get_base_layer().weight.data.copy_(before[module])
            layer.merged_adapters.clear()
    merged = {m: weights[m].double() - before[m].double() for m in weights}
    assert apart({m: added(delta, before[m]) for m, delta in found.items()}, merged) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_in_what_is_read_is_caught(name, whole, monkeypatch):
    kind = type(KINDS[name])
    right = kind.read
    monkeypatch.setattr(kind, "read", lambda self, layer: _off(right(self, layer)))
    assert read_is_what_was_trained(whole, name) > 1e-4


def _off(delta):
    """A delta whose last tensor is turned around, as a forgotten transposition or order would."""
    name, tensor = list(delta.tensors().items())[-1]
    return type(delta)(**{**delta.tensors(), name: tensor.flip(0).flip(1) + 0.01})


@pytest.mark.parametrize("name", EXACT)
def test_a_fault_in_the_rule_is_caught(name, whole, monkeypatch):
    kind = type(KINDS[name])
    right = kind.unfold
    monkeypatch.setattr(kind, "unfold", lambda self, layer, delta: _squared(right(self, layer, delta)))
    assert combined_is_the_mean(whole, name) > 1e-3


def _squared(delta):
    """A map that is not linear in the coordinates."""
    return type(delta)(**{n: t * t.abs() if n != "A" else t for n, t in delta.tensors().items()})


def test_bases_are_the_same_whatever_was_drawn_before(whole):
    for name in ("vera", "randlora"):
        found = set()
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.add(kind_shapes(whole, KINDS[name], spec_of(name))[1])
        assert len(found) == 1


def test_randlora_does_not_depend_on_the_half_precision_that_a_machine_has(whole, monkeypatch):
    found = set()
    for answer in (True, False):
        monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda answer=answer: answer)
        found.add(kind_shapes(whole, KINDS["randlora"], spec_of("randlora"))[1])
    assert len(found) == 1


def test_ia3_refuses_a_module_with_a_bias(whole):
    layer = whole.model.layers[0].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.zeros(32))
    try:
        with pytest.raises(ValueError, match=r"without a bias, got model\.layers\.0\.self_attn\.q_proj"):
            kind_shapes(whole, KINDS["ia3"], spec_of("ia3"))
    finally:
        layer.bias = None


def test_coordinates_of_another_shape_are_refused_by_name(whole):
    change, _ = trained(whole, "miss", {}, 1)
    wider = AdapterSpec(8, 16.0, ("q_proj", "v_proj"), kind="miss")
    misfit = r"self_attn\.q_proj must have coordinates of shape \(8, 32\), got \(4, 32\)"
    with pytest.raises(ValueError, match=misfit), train_kind(whole, KINDS["miss"], wider, change, FreshRows(0)):
        pass


@pytest.mark.parametrize("name", KINDS)
def test_averaged_parameters_are_those_that_peft_would_have(name, whole):
    """`average` against PEFT: parameters of two clients averaged in the layers themselves, and read."""
    kind, spec = KINDS[name], spec_of(name)
    weights = (0.7, 0.3)
    with attach(whole, kind, spec, split(kind, begun(whole, name))[1]) as (model, layers):
        for module, layer in layers.items():
            kind.begin(layer, module, FreshRows(0))
        trained = [p for p in model.parameters() if p.requires_grad]
        begin, states, replies = [p.detach().clone() for p in trained], [], []
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            states.append([p + 0.1 * torch.randn(p.shape, generator=generator) for p in begin])
            _set(trained, states[-1])
            replies.append({module: kind.read(layer) for module, layer in layers.items()})
        _set(trained, [sum(w * p for w, p in zip(weights, parts, strict=True)) for parts in zip(*states, strict=True)])
        for module, layer in layers.items():
            found = kind.average(layer, [reply[module] for reply in replies], weights)
            if found is None:  # what travels does not say what the parameters are
                assert kind.rule == "dense: mean of ΔW"
                continue
            wanted = kind.read(layer)
            for tensor, other in zip(found.tensors().values(), wanted.double().tensors().values(), strict=True):
                assert torch.allclose(tensor, other, atol=1e-5), module


@torch.no_grad()
def _set(parameters, values):
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
