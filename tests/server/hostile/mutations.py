"""What a hostile or broken client makes of a sound reply, each with the verdict that it knows of itself.

A mutation changes the content of a reply in place. `harmful` says whether the server has to refuse what comes out:
that is decided by the protocol here, and not asked of the server.
"""

import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from corolla.client.bundle import Part, bundle, unbundle
from corolla.client.protocol import STYPE

MARKUP = "[/bold][red]<script>alert(1)</script>\x1b[2J\r\n‮"


@dataclass(frozen=True)
class Mutation:
    """`change(content, rng)` in place; `part` is what of a reply it touches: two of one part could undo each other."""

    name: str
    part: str
    harmful: bool
    change: Callable[[RecordDict, random.Random], object]


def array_of(array: Array, **changes) -> Array:
    return Array(**({"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes))


def loosen(content: RecordDict) -> None:
    """The adapter's bundle becomes its arrays, so that each can be changed."""
    parts = unbundle(content.array_records["adapter"])
    content["adapter"] = ArrayRecord({name: array_of(part, data=bytes(part.data)) for name, part in parts.items()})


def bind(content: RecordDict) -> None:
    """They become a bundle again, whatever they are now; what is no arrays any more stays."""
    if arrays := content.array_records.get("adapter"):
        content["adapter"] = bundle((name, Part(a.dtype, a.shape, a.stype, a.data)) for name, a in arrays.items())


def _arrays(content: RecordDict) -> ArrayRecord:
    return content.array_records["adapter"]


def _pick(content: RecordDict, rng: random.Random) -> tuple[str, Array]:
    key = rng.choice(sorted(_arrays(content)))
    return key, _arrays(content)[key]


def _one(**changes):
    """Changes fields of one array; a callable takes the array."""

    def change(content, rng):
        key, array = _pick(content, rng)
        _arrays(content)[key] = array_of(
            array, **{name: value(array) if callable(value) else value for name, value in changes.items()}
        )

    return change


def _renamed(rename: Callable[[str], str]):
    def change(content, rng):
        key, array = _pick(content, rng)
        del _arrays(content)[key]
        _arrays(content)[rename(key)] = array

    return change


def _added(name: str):
    def change(content, rng):
        _arrays(content)[name] = _pick(content, rng)[1]

    return change


def _entry(value: float):
    """One entry of one array becomes `value`."""

    def change(content, rng):
        key, array = _pick(content, rng)
        numbers = np.frombuffer(array.data, "<f4").copy()
        numbers[rng.randrange(len(numbers))] = value
        _arrays(content)[key] = array_of(array, data=numbers.tobytes())

    return change


def _filled(value: float):
    def change(content, rng):
        for key, array in list(_arrays(content).items()):
            size = len(array.data) // 4
            _arrays(content)[key] = array_of(array, data=np.full(size, value, "<f4").tobytes())

    return change


def _saved(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(array.data, "<f4").reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()


class Bomb:
    """Says so where anybody unpickles it."""

    exploded: list[str] = []  # noqa: RUF012

    def __reduce__(self):
        return Bomb.exploded.append, ("unpickled",)


def _pickled(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _other_rank(content, rng):
    """One component more in every factor, or one less."""
    step = rng.choice([-1, 1])
    for key, array in list(_arrays(content).items()):
        side = {"A": 0, "B": 1, "W": 0}[key[-1]]
        shape = [*array.shape]
        shape[side] += step
        _arrays(content)[key] = array_of(array, shape=tuple(shape), data=bytes(4 * math.prod(shape)))


def _transposed(content, rng):
    key, array = _pick(content, rng)
    numbers = np.frombuffer(array.data, "<f4").reshape(array.shape).T
    _arrays(content)[key] = array_of(array, shape=numbers.shape, data=numbers.tobytes())


def _swapped_modules(content, rng):
    old = dict(_arrays(content))
    other = {"layer.q": "layer.v", "layer.v": "layer.q"}
    for key in old:
        module, _, name = key.rpartition("/")
        _arrays(content)[key] = old[f"{other[module]}/{name}"]


def _zero_size(content, rng):
    for key, array in list(_arrays(content).items()):
        side = {"A": 0, "B": 1, "W": 0}[key[-1]]
        shape = tuple(0 if i == side else n for i, n in enumerate(array.shape))
        _arrays(content)[key] = array_of(array, shape=shape, data=b"")


def _many(content, rng):
    """Thousands of names for one array: little on the wire, much where each is read."""
    array = _pick(content, rng)[1]
    for i in range(3000):
        _arrays(content)[f"layer.{i}/A"] = array


def _reordered(content, rng):
    items = list(_arrays(content).items())
    rng.shuffle(items)
    content["adapter"] = ArrayRecord(dict(items))


def shape(*sides, size=None):
    return _one(shape=sides, data=bytes(4 * (math.prod(sides) if size is None else size)))


ADAPTER = {
    "wrong key": (True, _renamed(lambda key: f"{key}x")),
    "path as key": (True, _renamed(lambda key: f"../../{key}")),
    "path besides": (True, _added("../../etc/passwd/A")),
    "lookalike": (True, _renamed(lambda key: key.replace("a", "а"))),  # a Cyrillic one
    "other case": (True, _renamed(lambda key: key.replace("layer", "Layer"))),
    "other case besides": (True, _added("LAYER.Q/A")),
    "space": (True, _renamed(lambda key: f"{key} ")),
    "small factor": (True, _renamed(lambda key: key[:-1] + key[-1].lower())),
    "no factor": (True, _added("layer.q/")),
    "no key": (True, _added("")),
    "no module": (True, _added("/A")),
    "alone": (True, _added("A")),
    "whole besides": (True, _added("layer.q/ABW")),
    "long key": (True, _added("x" * 10**5 + "/A")),
    "markup in key": (True, _renamed(lambda key: MARKUP + key)),
    "missing key": (True, lambda content, rng: _arrays(content).pop(_pick(content, rng)[0])),
    "no keys": (True, lambda content, rng: content.__setitem__("adapter", ArrayRecord())),
    "many keys": (True, _many),
    "other rank": (True, _other_rank),
    "transposed": (True, _transposed),
    "swapped modules": (True, _swapped_modules),
    "zero size": (True, _zero_size),
    "no rank": (True, shape(0, 8)),
    "scalar": (True, shape()),
    "flat": (True, _one(shape=lambda a: (math.prod(a.shape),))),
    "one axis more": (True, _one(shape=lambda a: (*a.shape, 1))),
    "hundred axes": (True, _one(shape=lambda a: (*a.shape, *[1] * 100))),
    "negative": (True, _one(shape=lambda a: tuple(-n for n in a.shape))),
    "minus one": (True, _one(shape=lambda a: (-1, a.shape[1]))),
    "huge side": (True, _one(shape=(2**40,))),
    "huge sides": (True, _one(shape=(2**40, 2**40))),
    "overflow": (True, _one(shape=(0, 2**70), data=b"")),
    "wraps to zero": (True, _one(shape=(2**32, 2**32), data=b"")),
    "boolean sides": (True, _one(shape=(True, True), data=bytes(4))),
    "double": (True, _one(dtype="float64", data=lambda a: np.frombuffer(a.data, "<f4").astype("<f8").tobytes())),
    "half": (True, _one(dtype="float16", data=lambda a: np.frombuffer(a.data, "<f4").astype("<f2").tobytes())),
    "integers": (True, _one(dtype="int32")),
    "big-endian": (True, _one(dtype=">f4")),
    "object": (True, _one(dtype="object")),
    "stock type": (True, _one(stype="numpy.ndarray", data=_saved)),
    "pickle": (True, _one(stype="numpy.ndarray", dtype="object", data=_pickled)),
    "pickle of ours": (True, _one(data=_pickled)),
    "newer type": (True, _one(stype=STYPE + "0")),
    "cut": (True, _one(data=lambda a: a.data[:-1])),
    "cut by one": (True, _one(data=lambda a: a.data[:-4])),
    "longer": (True, _one(data=lambda a: a.data + bytes(4))),
    "empty": (True, _one(data=b"")),
    "NaN": (True, _entry(math.nan)),
    "infinity": (True, _entry(math.inf)),
    "minus infinity": (True, _entry(-math.inf)),
    "largest": (True, _filled(3e38)),
    "huge": (True, _filled(1e20)),
    "reordered": (False, _reordered),
    "minus zero": (False, _entry(-0.0)),
    "denormal": (False, _entry(1e-42)),
    "nothing learned": (False, _filled(0.0)),
    "one large": (False, _entry(1e4)),
}

RECEIPT_VALUES = {
    "client_id": ["", "sound-0", "../../x", "x" * 10**6, MARKUP, 7, b"h00", ["h00"]],
    "round": [0, -1, 10**6, 2**63, 1.0, True, "1", [1]],
    "model": ["", "0" * 64, b"", 3, MARKUP],
    "base_hash": ["", "another", "the-base ", 0.0],
    "num_examples": [0, -1, 1, 10**6, 2**40, 2**63 - 1, 2**64 - 1, -(2**63), True, 10.0, math.nan, "10", [10], b"1"],
    "processed": [-1, 2**40 + 1, 2**63, -(2**63), True, 4.0, math.inf, "4", [4, 4]],
    "trains": ["", "ABW", "BA", "b", "AB" * 10**5, True, MARKUP],
}


def _receipt(name: str, value):
    return lambda content, rng: content.config_records["receipt"].__setitem__(name, value)


def _metric(name: str, value):
    def change(content, rng):
        record = content.metric_records.get("metrics")
        if record is not None:
            record[name] = value

    return change


def _numbers(count: int):
    def change(content, rng):
        for i in range(count):
            content.metric_records["metrics"][f"n{i}"] = 0.5

    return change


METRICS = {
    "NaN": (True, _metric("train_loss", math.nan)),
    "infinity": (True, _metric("loss_before", -math.inf)),
    "sum overflows": (True, _metric("loss_before", 1.7e308)),
    "list": (True, _metric("train_loss", [1.0, 2.0])),
    "empty list": (True, _metric("train_loss", [])),
    "nameless": (True, _metric("", 1.0)),
    "long name": (True, _metric("x" * 10**5, 1.0)),
    "markup": (True, _metric(MARKUP, 1.0)),
    "many": (True, _numbers(10_001)),
    "one more": (False, _metric("perplexity", 7.25)),
    "some more": (False, _numbers(300)),
    "whole number": (False, _metric("steps", 3)),
    "large number": (False, _metric("tokens", 2**63 - 1)),
    "minus zero": (False, _metric("margin", -0.0)),
    "denormal": (False, _metric("margin", 5e-324)),
    "foreign letters": (False, _metric("loss/日本語 ä", 1.0)),
    "of the server": (False, _metric("weight", 0.9)),
    "absent": (False, lambda content, rng: content.pop("metrics", None)),
    "none": (False, lambda content, rng: content.__setitem__("metrics", MetricRecord())),
}

RECORDS = {
    "no adapter": (True, lambda content, rng: content.pop("adapter", None)),
    "no receipt": (True, lambda content, rng: content.pop("receipt", None)),
    "nothing": (True, lambda content, rng: [content.pop(name) for name in list(content)]),
    "adapter is no arrays": (True, lambda content, rng: content.__setitem__("adapter", ConfigRecord({"a": 1}))),
    "receipt is numbers": (True, lambda content, rng: content.__setitem__("receipt", MetricRecord({"round": 1}))),
    "receipt is arrays": (True, lambda content, rng: content.__setitem__("receipt", ArrayRecord())),
    "other names": (True, lambda content, rng: content.__setitem__("Adapter", content.pop("adapter"))),
    "record more": (False, lambda content, rng: content.__setitem__("notes", ConfigRecord({"b": b"\0", "l": [1, 2]}))),
    "arrays more": (False, lambda content, rng: content.__setitem__("../x", ArrayRecord([np.full((2, 2), math.nan)]))),
    "field more": (False, lambda content, rng: content.config_records["receipt"].__setitem__("note", MARKUP)),
    "metrics are words": (False, lambda content, rng: content.__setitem__("metrics", ConfigRecord({"loss": "low"}))),
    "last first": (
        False,
        lambda content, rng: [content.__setitem__(n, content.pop(n)) for n in list(reversed(list(content)))],
    ),
}

TRAIN = {
    f"{part}: {name}": Mutation(f"{part}: {name}", part, *what)
    for part, group in (("adapter", ADAPTER), ("metrics", METRICS), ("records", RECORDS))
    for name, what in group.items()
}
for _name, _values in RECEIPT_VALUES.items():
    for _i, _value in enumerate(_values):
        _key = f"receipt: {_name} {_i}"
        TRAIN[_key] = Mutation(_key, "receipt", True, _receipt(_name, _value))
    _key = f"receipt: no {_name}"
    TRAIN[_key] = Mutation(
        _key, "receipt", True, lambda content, rng, n=_name: content.config_records["receipt"].pop(n)
    )
TRAIN["receipt: processed nothing"] = Mutation("receipt: processed nothing", "receipt", False, _receipt("processed", 0))
TRAIN["receipt: most processed"] = Mutation("receipt: most processed", "receipt", False, _receipt("processed", 2**40))


def _hello(name: str, value):
    return lambda content, rng: content.config_records["hello"].__setitem__(name, value)


def _shapes(**changes):
    """Modules of a hello changed, None: left out."""

    def change(content, rng):
        record = content.config_records["hello"]
        found = json.loads(record["shapes"]) | changes
        record["shapes"] = json.dumps({m: s for m, s in found.items() if s is not None})

    return change


HELLO_VALUES = {
    "client_id": ["", ".", "..", "../../x", "sound-0", "SOUND-0", "sоund-0", "x" * 129, "x" * 10**6, MARKUP, 7, b"h"],
    "rank": [0, -1, 9, 10**9, 2**63, True, 4.0, "4"],
    "base_hash": ["", "another", "x" * 10**6, MARKUP, 1],
    "num_examples": [0, -1, 2**40 + 1, 2**63 - 1, 2**64 - 1, -(2**63), True, 1.5, "10", [10]],
    "shapes": [
        "", "{", "[1]", "null", "{}", "NaN", '{"layer.q": 5}', '{"layer.q": [6]}', '{"layer.q": [6, 8, 1]}',
        '{"layer.q": [6.0, 8]}', '{"layer.q": [true, 8]}', '{"layer.q": [0, 8]}', '{"layer.q": [-6, 8]}',
        '{"layer.q": [1e999, 8]}', '{"layer.q": [16777217, 8]}', '{"layer.q": [' + "9" * 5000 + ", 8]}",
        "[" * 10**5, '{"a":' * 10**5, '{"": [6, 8]}', json.dumps({"x" * 10**5: [6, 8]}), json.dumps({MARKUP: [6, 8]}),
        7, b"{}", ["{}"],
    ],
    "heads": ["", "[]", '{"head": [0, 1]}', '{"layer.q": [6, 8]}', "[" * 10**5],
}  # fmt: skip

HELLO = {
    f"hello: {name} {i}": Mutation(f"hello: {name} {i}", "hello", True, _hello(name, value))
    for name, values in HELLO_VALUES.items()
    for i, value in enumerate(values)
} | {
    f"hello: {name}": Mutation(f"hello: {name}", "hello", harmful, change)
    for name, (harmful, change) in {
        "no record": (True, lambda content, rng: content.pop("hello")),
        "numbers": (True, lambda content, rng: content.__setitem__("hello", MetricRecord({"rank": 1}))),
        "no rank": (True, lambda content, rng: content.config_records["hello"].pop("rank")),
        "other shape": (True, _shapes(**{"layer.q": [5, 8]})),
        "other order": (True, _shapes(**{"layer.q": [8, 6]})),
        "memory": (
            True,
            lambda content, rng: [
                _shapes(**{"layer.z": [2**24, 2**24]})(content, rng),
                _hello("rank", 2**20)(content, rng),
            ],
        ),
        "record more": (False, lambda content, rng: content.__setitem__("notes", ConfigRecord({"b": b"\0"}))),
        "field more": (False, lambda content, rng: content.config_records["hello"].__setitem__("note", MARKUP)),
        "spaces": (False, lambda content, rng: _hello("heads", " { } \n")(content, rng)),
    }.items()
}

EVALUATE = {name: mutation for name, mutation in TRAIN.items() if mutation.part == "metrics"} | {
    f"examples: {i}": Mutation(f"examples: {i}", "examples", harmful, _metric(name, value))
    for i, (harmful, name, value) in enumerate(
        [
            (True, "examples", 0.0),
            (True, "examples", -5.0),
            (True, "examples", 2.0**63),
            (True, "examples", 1e30),
            (True, "examples/group", -1.0),
            (True, "examples/group", 2**62),
            (False, "examples/group", 3.0),
            (False, "examples", 12),
        ]
    )
}
