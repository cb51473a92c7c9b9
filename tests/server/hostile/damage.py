"""Bytes of a reply changed blindly: nobody knows beforehand what the reader makes of it."""

import json
import random
from collections.abc import Callable

from tests.server.hostile.wire import Parcel


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def duplicate(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    last = rng.randrange(first, len(data)) + 1
    return data[:last] + data[first:last] + data[last:]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 4, 64])) + data[place:]


def remove(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice([1, 4, 16]) :]


def number(data: bytes, rng: random.Random) -> bytes:
    """Another number for a digit: sizes, places and lengths are written in digits."""
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not digits:
        return flip(data, rng)
    place = rng.choice(digits)
    wild = rng.choice([b"-1", b"0", b"99999999999999999999", b"1e9", b"true", b"null", b'"x"', b"[]", b"{}"])
    return data[:place] + wild + data[place + 1 :]


def twice(data: bytes, rng: random.Random) -> bytes:
    """A JSON key that comes twice, with a neighbour's value; other bytes follow themselves, as protobuf allows."""
    try:
        items = list(json.loads(data).items())
    except ValueError:
        return data + data
    except AttributeError:
        return data
    if not items:
        return data
    key, value = rng.choice(items)[0], rng.choice(items)[1]
    return data[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}".encode()


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (truncate, flip, duplicate, insert, remove, number, twice)
}


def damaged(parcel: Parcel, kind: str, rng: random.Random) -> Parcel:
    """One object's body changed, its length and all hashes made right again, so that the SuperLink lets it through;
    now and then left wrong, so that it does not."""
    name = rng.choice(list(parcel.objects))
    head, _, body = parcel.objects[name].partition(b"\0")
    if not body or rng.random() < 0.1:  # the head is damaged as well
        content = DAMAGE[kind](parcel.objects[name], rng)
    else:
        body = DAMAGE[kind](body, rng)
        content = b" ".join([*head.split(b" ")[:2], str(len(body)).encode()]) + b"\0" + body
    if rng.random() < 0.1:
        return Parcel({**parcel.objects, name: content}, parcel.metadata)
    return parcel.replaced(name, content)
