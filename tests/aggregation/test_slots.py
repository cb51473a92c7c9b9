"""Replies in their places: the same stack, without a second copy of A."""

import pytest
import torch

from corolla.aggregation import ClientUpdate, DenseDelta, Slots, client_weights, stack
from tests.aggregation.federations import SHAPES, random_delta

RANKS = {"ann": 3, "bob": 1, "cleo": 2}


def replies():
    return {
        name: {m: random_delta(*SHAPES[m], rank, i) for m in SHAPES if (name, m) != ("bob", "v")}
        for i, (name, rank) in enumerate(RANKS.items())
    }


def placed(names):
    """The updates of these clients, put in this order, and their plain counterparts."""
    shapes = {name: {m: SHAPES[m] for m in adapter} for name, adapter in replies().items()}
    slots = Slots(shapes, RANKS)
    return (
        [ClientUpdate(name, RANKS[name], slots.put(name, replies()[name])) for name in names],
        [ClientUpdate(name, RANKS[name], replies()[name]) for name in names],
    )


@pytest.mark.parametrize("names", [("ann", "bob", "cleo"), ("cleo", "ann", "bob"), ("cleo", "ann"), ("bob",)])
def test_the_stack_is_the_same_in_whatever_order_replies_come_and_whoever_is_missing(names):
    updates, plain = placed(names)
    weights = client_weights(plain)
    ours, expected = stack(updates, weights), stack(plain, weights)
    assert ours.keys() == expected.keys()
    for module in expected:
        assert torch.equal(ours[module].A, expected[module].A)
        assert torch.equal(ours[module].B, expected[module].B)


def test_where_all_replied_a_is_not_copied_again():
    updates, plain = placed(("bob", "cleo", "ann"))
    together = stack(updates, client_weights(plain))["q"].A
    assert together.data_ptr() == updates[2].adapter["q"].A.data_ptr()
    apart, _ = placed(("ann", "cleo"))
    assert stack(apart, client_weights(apart))["q"].A.data_ptr() != apart[0].adapter["q"].A.data_ptr()


def test_what_has_no_place_is_refused():
    slots = Slots({"ann": SHAPES}, RANKS)
    with pytest.raises(KeyError):
        slots.put("bob", {"q": random_delta(*SHAPES["q"], 1, 0)})
    with pytest.raises(ValueError, match="factors A and B, got DenseDelta"):
        slots.put("ann", {"q": DenseDelta(torch.zeros(SHAPES["q"]))})
