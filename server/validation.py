"""What a reply must be before it may touch the global model. What it is not puts it in quarantine, with the reason."""

import math
import re

import torch

from corolla import __version__
from corolla.aggregation import Delta, DenseDelta, Shapes
from corolla.client.protocol import WHOLE, Hello, Order, Reply

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""Names become parts of file names and of reports."""

LARGEST_CHANGE = 1e12
"""No training makes a larger one, and the square of it still fits into float32."""


class Rejected(ValueError):
    """A reply that is kept out of the round; the message is the reason."""


def check_reply(reply: Reply, hello: Hello, order: Order) -> None:
    """Raises Rejected unless `reply` answers `order`, comes from the client of `hello`, and is a sound adapter.

    Checked: the client, the round, the version of the global model, the base, what was trained, that there are
    examples, exactly the client's modules, their shapes, the rank that was asked for, and that every number is finite
    and of a size that training makes.
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
    shapes = {**hello.shapes, **hello.heads}
    if reply.adapter.keys() != shapes.keys():
        odd = sorted(reply.adapter.keys() ^ shapes.keys())
        raise Rejected(f"modules must be those of the client's hello, got a difference in {', '.join(odd[:4])}")
    for module, delta in reply.adapter.items():
        whole = order.trains == WHOLE or module in hello.heads
        if isinstance(delta, DenseDelta) != whole:
            wanted = "whole weights" if whole else "factors A and B"
            raise Rejected(f"{module} must come as {wanted}, got {'+'.join(delta.tensors())}")
        if delta.shape != shapes[module] or (not whole and delta.rank != order.rank):
            raise Rejected(
                f"{module} must have shape {shapes[module]} and rank {order.rank}, got {delta.shape} and {delta.rank}"
            )
        if not all(torch.isfinite(tensor).all() for tensor in delta.tensors().values()):
            raise Rejected(f"{module} must be finite, got NaN or infinity")
        if not (size := _size(delta)) <= LARGEST_CHANGE:
            raise Rejected(f"{module} must change by at most {LARGEST_CHANGE:g}, got factors of size {size:.1e}")


def _size(delta: Delta) -> float:
    """A bound of ‖ΔW‖_F: the product of the norms of its tensors."""
    return math.prod(float(tensor.double().norm()) for tensor in delta.tensors().values())


def check_hello(hello: Hello, base_hash: str, shapes: Shapes) -> None:
    """Raises Rejected for a node that cannot take part.

    That is one with another corolla or base, without data, modules or a usable name, or whose modules have other
    shapes than `shapes` knows.
    """
    if not NAME.fullmatch(hello.client_id):
        raise Rejected(f"a client's name must be letters, digits, '.', '_' or '-', got {hello.client_id!r}")
    if hello.version != __version__:
        raise Rejected(
            f"corolla must be {__version__}, as on the server, got {hello.version!r}: install the same version"
        )
    if hello.base_hash != base_hash:
        raise Rejected(f"base hash must be {base_hash}, got {hello.base_hash}: use the same checkpoint as the server")
    if hello.num_examples < 1:
        raise Rejected(f"a client needs at least one training example, got {hello.num_examples}")
    if hello.rank < 1 or not hello.shapes:
        raise Rejected(
            f"a client needs a rank and modules to adapt, got rank {hello.rank} and {len(hello.shapes)} modules"
        )
    widest = max(max(shape) for shape in hello.shapes.values())
    if hello.rank > widest:
        raise Rejected(f"rank must be at most {widest}, the longest side of the client's modules, got {hello.rank}")
    if both := sorted(hello.shapes.keys() & hello.heads.keys()):
        raise Rejected(f"a module is adapted or trained whole, got both for {both[0]}")
    for module, shape in {**hello.shapes, **hello.heads}.items():
        if shape != shapes.get(module, shape):
            raise Rejected(f"{module} must have shape {shapes[module]}, as other clients have it, got {shape}")
