"""Many arrays as one: Flower asks for every array of a message by itself, over each of its hops.

A bundle is one array of bytes: the length of a list as 8 bytes, the list as JSON (name, dtype, shape, serialisation
type, bytes of every array) with spaces after it, and the arrays' bytes one after another.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

BUNDLE = "bundle"
"""The name of the one array."""

STYPE = "corolla.bundle.v1"
"""Its serialisation type."""

ALIGNED = 64
"""The arrays' bytes begin at a multiple of it, so that they can be read where they are."""


@dataclass(frozen=True)
class Part:
    """One array of a bundle; its fields are those of Flower's Array, `data` a view of the bundle's."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: Any


def bundle(parts: Iterable[tuple[str, Part]]) -> ArrayRecord:
    """A record with all of them."""
    parts = list(parts)
    entries = [[name, part.dtype, list(part.shape), part.stype, len(part.data)] for name, part in parts]
    head = json.dumps(entries).encode()
    head += b" " * (-(8 + len(head)) % ALIGNED)
    data = b"".join([len(head).to_bytes(8, "little"), head, *(part.data for _, part in parts)])
    return ArrayRecord({BUNDLE: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def release(content: RecordDict) -> None:
    """Empties the records of a message that is of no more use, for their bytes to go now.

    Flower's RecordDict refers to itself, so that by itself it stays until the garbage collector comes by.
    """
    for record in content.array_records.values():
        record.clear()
    content.clear()


def unbundle(record: ArrayRecord) -> dict[str, Part]:
    """Every array by its name, none of them read. Raises ValueError for what is no bundle, or one that does not add up:
    every byte belongs to one array."""
    if list(record) != [BUNDLE] or record[BUNDLE].stype != STYPE:
        got = ", ".join(f"{name!r} of type {array.stype!r}" for name, array in list(record.items())[:2])
        raise ValueError(f"arrays must come as one of type {STYPE}, got {got or 'none'}")
    data = memoryview(record[BUNDLE].data)
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 <= end <= len(data):
        raise ValueError(f"a bundle of {len(data)} bytes must hold its list, got one of {end - 8} bytes")
    try:
        entries = json.loads(bytes(data[8:end]))
    except RecursionError as error:
        raise ValueError("a bundle's list must be flat, got JSON nested too deep") from error
    parts: dict[str, Part] = {}
    for name, dtype, shape, stype, size in _checked(entries):
        if name in parts:
            raise ValueError(f"a bundle must hold an array once, got {name!r} twice")
        parts[name] = Part(dtype, tuple(shape), stype, data[end : end + size])
        end += size
    if end != len(data):
        raise ValueError(f"a bundle must hold {end} bytes by its list, got {len(data)}")
    return parts


def _checked(entries: Any) -> list[list[Any]]:
    if not isinstance(entries, list):
        raise ValueError(f"a bundle needs a list of arrays, got {type(entries).__name__}")
    for entry in entries:
        kinds = [type(value) for value in entry] if isinstance(entry, list) else entry
        if kinds != [str, str, list, str, int] or entry[4] < 0:
            raise ValueError(f"an array of a bundle needs name, dtype, shape, type and bytes, got {str(entry)[:100]}")
    return entries
