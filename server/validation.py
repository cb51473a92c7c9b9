"""What a reply must be before it may touch the global model. What it is not puts it in quarantine, with the reason."""

import math

import torch

from corolla.aggregation import DenseDelta
from corolla.client.protocol import Hello, Order, Reply


class Rejected(ValueError):
    """A reply that is kept out of the round; the message is the reason."""


def check_reply(reply: Reply, hello: Hello, order: Order) -> None:
    """Raises Rejected unless `reply` answers `order`, comes from the client of `hello`, and is a sound adapter.

    Checked: the client, the round, the version of the global model, the base, the sample counts, exactly the
    client's modules, their shapes, the rank that was asked for, and that every number is finite.
    """
    for what, wanted, got in (
        ("client", hello.client_id, reply.client_id),
        ("round", order.round, reply.round),
        ("model version", order.model, reply.model),
        ("base hash", order.base_hash, reply.base_hash),
        ("trained tensors", order.trains, reply.trains),
    ):
        if wanted != got:
            raise Rejected(f"{what} must be {wanted}, got {got}")
    if reply.num_examples < 1 or reply.processed < 0:
        raise Rejected(
            f"num_examples must be at least 1 and processed at least 0, got {reply.num_examples} and {reply.processed}"
        )
    if reply.adapter.keys() != hello.shapes.keys():
        odd = sorted(reply.adapter.keys() ^ hello.shapes.keys())
        raise Rejected(f"modules must be those of the client's hello, got a difference in {', '.join(odd[:4])}")
    for module, delta in reply.adapter.items():
        if isinstance(delta, DenseDelta) != (order.trains == "W"):
            wanted = "whole weights" if order.trains == "W" else "factors A and B"
            raise Rejected(f"{module} must come as {wanted}, got {'+'.join(delta.tensors())}")
        if delta.shape != hello.shapes[module] or (order.trains != "W" and delta.rank != order.rank):
            raise Rejected(
                f"{module} must have shape {hello.shapes[module]} and rank {order.rank}, "
                f"got {delta.shape} and {delta.rank}"
            )
        if not all(torch.isfinite(tensor).all() for tensor in delta.tensors().values()):
            raise Rejected(f"{module} must be finite, got NaN or infinity")
    for name, value in reply.metrics.items():
        if not math.isfinite(value):
            raise Rejected(f"metric {name} must be finite, got {value}")


def check_hello(hello: Hello, base_hash: str) -> None:
    """Raises Rejected for a node with another base, without data, or without modules."""
    if hello.base_hash != base_hash:
        raise Rejected(f"base hash must be {base_hash}, got {hello.base_hash}: use the same checkpoint as the server")
    if hello.num_examples < 1:
        raise Rejected(f"a client needs at least one training example, got {hello.num_examples}")
    if hello.rank < 1 or not hello.shapes:
        raise Rejected(
            f"a client needs a rank and modules to adapt, got rank {hello.rank} and {len(hello.shapes)} modules"
        )
