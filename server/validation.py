"""What a reply must be before it may touch the global model. What it is not puts it in quarantine, with the reason."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord

from corolla import __version__
from corolla.aggregation import AdapterState, Delta, Shapes
from corolla.client.bundle import unbundle
from corolla.client.protocol import WHOLE, Hello, Order, Reply
from corolla.server.scores import EXAMPLES

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""Names become parts of file names and of reports."""

LARGEST_CHANGE = 1e12
"""No training makes a larger one, and the square of it still fits into float32."""

LARGEST_COUNT = 2**40
"""No client has more examples, and sums of such counts are exact in float64."""

LARGEST_ADAPTER = 2**32
"""Entries of the factors that a client declares by its rank and shapes: some methods make room for them beforehand."""

LONGEST_REASON = 300
"""Characters. Reasons go into every line of metrics.jsonl, the log and the report."""


class Rejected(ValueError):
    """A reply that is kept out of the round; the message is the reason."""


def reason_of(text: object) -> str:
    """`text` as it may be recorded, logged and shown: one line of at most LONGEST_REASON characters, all printable.

    A client writes part of it: what it failed of, or what it sent instead of what was needed.
    """
    start = str(text)[: LONGEST_REASON + 1]
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in start)
    return plain if len(plain) <= LONGEST_REASON else plain[: LONGEST_REASON - 1] + "…"


def check_receipt(reply: Reply, hello: Hello, order: Order) -> None:
    """Raises Rejected unless `reply` answers `order` and comes from the client of `hello`, with the same examples.

    Checked: the client, the round, the version of the global model, the base, what was trained, and the counts. What
    a client weighs it says once, in its hello, before it knows a round's model: one that said another number with
    every reply could own the mean of the rounds that it likes. Its data do not change within a run.
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
    if reply.num_examples != hello.num_examples:
        raise Rejected(
            f"num_examples must be {hello.num_examples} as in the client's hello, got {reply.num_examples}: a client "
            "whose data changed joins anew"
        )
    if not 0 <= reply.processed <= LARGEST_COUNT:
        raise Rejected(f"processed must be from 0 to {LARGEST_COUNT}, got {reply.processed}")


def check_arrays(record: ArrayRecord, hello: Hello, order: Order, least: int | None = None) -> None:
    """Raises Rejected unless `record` has exactly the arrays of the order, by their names and declared shapes.

    Before any of them is read. A module may have from `least` components (None: all) to the order's, as many in A as
    in B.
    """
    shapes = {**hello.shapes, **hello.heads}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, part in unbundle(record).items():
        module, _, name = key.rpartition("/")
        found.setdefault(module, {})[name] = part.shape
    if found.keys() != shapes.keys():
        odd = sorted(found.keys() ^ shapes.keys())
        raise Rejected(f"modules must be those of the client's hello, got a difference in {', '.join(odd[:4])}")
    for module, arrays in found.items():
        rank = _rank_of(arrays, order, order.rank if least is None else least)
        wanted = _shapes_of(shapes[module], replace(order, rank=rank), whole=module in hello.heads)
        if arrays.keys() != wanted.keys():
            raise Rejected(f"{module} must come as {_some(wanted)}, got {_some(arrays)}")
        if arrays != wanted:
            raise Rejected(
                f"{module} must have shape {shapes[module]} and rank {order.rank}, got "
                + ", ".join(f"{name} {shape}" for name, shape in sorted(arrays.items()))
            )


def _rank_of(arrays: Mapping[str, tuple[int, ...]], order: Order, least: int) -> int:
    """The rank that A says, where it may be that; else the order's."""
    rank = arrays["A"][0] if arrays.get("A") else order.rank
    return rank if least <= rank <= order.rank else order.rank


def _shapes_of(shape: tuple[int, int], order: Order, *, whole: bool) -> dict[str, tuple[int, int]]:
    """The tensors of a module of this shape that the order wants back, with their shapes."""
    if whole or order.trains == WHOLE:
        return {WHOLE: shape}
    factors = {"A": (order.rank, shape[1]), "B": (shape[0], order.rank), "d": (shape[0], 1)}
    return {name: factor for name, factor in factors.items() if name in order.trains}


def _some(names: Iterable[str]) -> str:
    return "+".join(sorted(names)[:4]) or "nothing"


def check_numbers(adapter: AdapterState) -> None:
    """Raises Rejected unless every number is finite and of a size that training makes."""
    for module, delta in adapter.items():
        if not all(torch.isfinite(tensor).all() for tensor in delta.tensors().values()):
            raise Rejected(f"{module} must be finite, got NaN or infinity")
        if not (size := _size(delta)) <= LARGEST_CHANGE:
            raise Rejected(f"{module} must change by at most {LARGEST_CHANGE:g}, got factors of size {size:.1e}")


def _size(delta: Delta) -> float:
    """A bound of ‖ΔW‖_F or of its coordinates': the product of the factors' norms, the norm of what is no factor."""
    norms = {name: float(tensor.double().norm()) for name, tensor in delta.tensors().items()}
    return max(norms.pop("A", 0.0) * norms.pop("B", 0.0), *norms.values(), 0.0)


def check_evaluation(metrics: Mapping[str, float]) -> None:
    """Raises Rejected unless `examples` and every `examples/<group>` of an evaluation are counts."""
    for name, value in metrics.items():
        if name.partition("/")[0] == EXAMPLES and not 0 < value <= LARGEST_COUNT:
            raise Rejected(f"an evaluation needs from 1 to {LARGEST_COUNT} {name}, got {value:g}")


def check_hello(hello: Hello, base_hash: str, shapes: Shapes) -> None:
    """Raises Rejected for a node that cannot take part.

    That is one with another corolla or base, without data, modules or a usable name, with more than any client can
    have, or whose modules have other shapes than `shapes` knows.
    """
    if not NAME.fullmatch(hello.client_id):
        raise Rejected(f"a client's name must be letters, digits, '.', '_' or '-', got {hello.client_id!r}")
    if hello.version != __version__:
        raise Rejected(
            f"corolla must be {__version__}, as on the server, got {hello.version!r}: install the same version"
        )
    if hello.base_hash != base_hash:
        raise Rejected(f"base hash must be {base_hash}, got {hello.base_hash}: use the same checkpoint as the server")
    if not 1 <= hello.num_examples <= LARGEST_COUNT:
        raise Rejected(f"a client needs from 1 to {LARGEST_COUNT} training examples, got {hello.num_examples}")
    if hello.rank < 1 or not hello.shapes:
        raise Rejected(
            f"a client needs a rank and modules to adapt, got rank {hello.rank} and {len(hello.shapes)} modules"
        )
    widest = max(max(shape) for shape in hello.shapes.values())
    if hello.rank > widest:
        raise Rejected(f"rank must be at most {widest}, the longest side of the client's modules, got {hello.rank}")
    if (size := hello.rank * sum(map(sum, hello.shapes.values()))) > LARGEST_ADAPTER:
        raise Rejected(f"an adapter may have {LARGEST_ADAPTER} entries, got rank and modules that make {size}")
    if both := sorted(hello.shapes.keys() & hello.heads.keys()):
        raise Rejected(f"a module is adapted or trained whole, got both for {both[0]}")
    for module, shape in {**hello.shapes, **hello.heads}.items():
        if shape != shapes.get(module, shape):
            raise Rejected(f"{module} must have shape {shapes[module]}, as other clients have it, got {shape}")
