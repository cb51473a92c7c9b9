"""Kinds that send what they change of the weights as A and B, beside a global model of A and B."""

import pytest
import torch

from corolla.adapters import KINDS, carrying, kind_shapes, require_mixable, train_unfolded, unfolded_shapes
from corolla.adapters.kinds import kind as kinds
from corolla.aggregation import FreshRows, LowRankDelta, add_adapters
from tests.adapters.test_kinds import PROBE, RANK, spec_of, whole

__all__ = ["whole"]
MIXABLE = [name for name, kind in KINDS.items() if not kind.no_factors]
SHAPES = {f"model.layers.{i}.self_attn.{m}": (out, 32) for i in (0, 1) for m, out in (("q_proj", 32), ("v_proj", 16))}


def frozen():
    generator = torch.Generator().manual_seed(1)
    shapes = {**SHAPES, "model.layers.0.self_attn.o_proj": (32, 32)}  # of which this client knows nothing
    return {
        m: LowRankDelta(torch.randn(3, i, generator=generator) / 8, torch.randn(o, 3, generator=generator) / 8)
        for m, (o, i) in shapes.items()
    }


def off(base, name) -> float:
    """How far base + frozen + what is read is from the trained model, in its logits."""
    before = frozen()
    with train_unfolded(base, KINDS[name], spec_of(name), before, FreshRows(0), 6) as (model, read):
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            found, logits = read(), model.eval()(input_ids=PROBE).logits
    assert {m: (d.rank, d.shape) for m, d in found.items()} == {m: (6, shape) for m, shape in SHAPES.items()}
    with carrying(base, add_adapters(before, found)) as model, torch.no_grad():
        return float((model(input_ids=PROBE).logits - logits).norm() / logits.norm())


@pytest.mark.parametrize("name", MIXABLE)
def test_what_is_sent_is_what_was_trained(name, whole, monkeypatch):
    assert off(whole, name) < 1e-5
    right = kinds._padded  # a fault: the components of another module's side
    monkeypatch.setattr(kinds, "_padded", lambda delta, rank: right(LowRankDelta(delta.A.flip(1), delta.B), rank))
    assert off(whole, name) > 1e-4


@pytest.mark.parametrize("name", MIXABLE)
def test_shapes_are_those_of_the_weights(name, whole):
    shapes, rank = unfolded_shapes(whole, KINDS[name], spec_of(name))
    assert (shapes, rank) == (SHAPES, RANK)
    assert kind_shapes(whole, KINDS[name], spec_of(name))[0] != SHAPES


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dora", "it scales the rows"),
        ("miss-bat", "full rank"),
        ("randlora", "full rank"),
        ("loha", "no small factors"),
        ("pissa", "begins at a part of it"),
        ("dorra", "must be one of lora"),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_the_reason(name, why):
    with pytest.raises(ValueError, match=why):
        require_mixable(name)
