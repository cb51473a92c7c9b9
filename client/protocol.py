"""What travels between server and client, as Flower records: packed here, unpacked here, checked on both sides.

Three messages: `query.hello` asks a node who it is; `train` brings a share of the global model and asks for an
adapter; `evaluate` brings the whole model and asks for metrics. Factors travel as raw float32 with a serialisation
type of their own, so that a stock strategy raises instead of averaging what it does not understand.
"""

import json
import math
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from corolla import __version__
from corolla.aggregation import (
    AdapterState,
    ClientUpdate,
    Delta,
    GlobalModel,
    LowRankState,
    Shapes,
    delta_of,
    low_rank,
)
from corolla.client.bundle import Part, bundle, unbundle

STYPE = "corolla.factor.v1"
"""Raw little-endian float32, row-major."""

HELLO = "query.hello"

WHOLE = "W"
"""The name of a whole change of weight, which always travels."""

LARGEST = 2**24
"""No weight matrix has a longer side: what a client says it has is not taken on trust."""

LARGEST_NUMBER = 1e100
"""No loss, count or time is larger, and sums of such numbers over clients and examples stay finite."""

MOST_NUMBERS, LONGEST_NAME = 10_000, 256
"""Of the metrics of one reply: they go to metrics.jsonl, the report and the trackers by name."""


def pack_adapter(adapter: AdapterState, names: Collection[str] = "ABd") -> ArrayRecord:
    """The tensors by `<module>/<name>` (A, B, d), as far as they are in `names`, or `<module>/W`, in one bundle."""
    parts = {}
    for module, delta in adapter.items():
        for name, tensor in delta.tensors().items():
            if name not in (*names, WHOLE):
                continue
            array = tensor.detach().contiguous().numpy().astype("<f4", copy=False)
            parts[f"{module}/{name}"] = Part("float32", tuple(array.shape), STYPE, _bytes(array))
    return bundle(parts.items())


def _bytes(array: np.ndarray) -> Any:
    """Its bytes without a copy."""
    return array.data.cast("B") if array.size else b""


def unpack_adapter(record: ArrayRecord, held: LowRankState = {}) -> dict[str, Delta]:  # noqa: B006  (only read)
    """The changes back, in the order of module names; factors that did not travel are those of `held`.

    Raises ValueError, naming the key, for anything out of shape.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, part in sorted(unbundle(record).items()):
        module, _, name = key.rpartition("/")
        modules.setdefault(module or key, {})[name] = _unpack_array(key, part)
    whole = {
        module: held[module].tensors() | tensors if module in held else tensors for module, tensors in modules.items()
    }
    return {module: delta_of(module, tensors) for module, tensors in whole.items()}


def _unpack_array(key: str, array: Part) -> torch.Tensor:
    if array.stype != STYPE or array.dtype != "float32":
        raise ValueError(f"{key} must be float32 of type {STYPE}, got {array.dtype} of type {array.stype}")
    if len(array.shape) != 2 or not all(_is_whole(n) and 0 <= n <= LARGEST for n in array.shape):
        raise ValueError(f"{key} must be a matrix with sides of at most {LARGEST}, got shape {array.shape}")
    expected = 4 * math.prod(array.shape)
    if len(array.data) != expected:
        raise ValueError(f"{key} of shape {tuple(array.shape)} must have {expected} bytes, got {len(array.data)}")
    found = np.frombuffer(array.data, dtype="<f4").reshape(tuple(array.shape))
    if not found.flags.aligned or sys.byteorder != "little":
        return torch.from_numpy(found.astype(np.float32))
    with warnings.catch_warnings():  # nothing writes to what came: it is read where it lies, and not copied
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(found)


def adapter_bytes(record: ArrayRecord) -> int:
    """The bytes of all factors in a record, as sent."""
    return sum(len(part.data) for part in unbundle(record).values())


Coordinates = tuple[str, int, tuple[tuple[str, tuple[int, int]], ...]]
"""The basis, how many components, and the modules with their shapes: what clients of one kind must have in common."""


@dataclass(frozen=True)
class Hello:
    """Who a node is: its name, the rank it declares, its base, its data and its modules.

    `version` is its corolla's; `shapes` are (out, in) of the modules that it adapts, or the shapes of its coordinates
    where its adapter is no LoRA, and `basis` is then the hash of what they are coordinates in; `heads` are the shapes
    of the modules that it trains whole (one column more where they have a bias).
    """

    client_id: str
    rank: int
    base_hash: str
    num_examples: int
    shapes: Shapes
    heads: Shapes = field(default_factory=dict)
    version: str = __version__
    basis: str = ""

    @property
    def coordinates(self) -> Coordinates:
        """What its adapter's numbers mean."""
        return self.basis, self.rank, tuple(sorted(self.shapes.items()))

    def pack(self) -> RecordDict:
        """As the content of a reply to `query.hello`."""
        named = {name: getattr(self, name) for name in ("shapes", "heads")}
        values = asdict(self) | {n: json.dumps({m: list(s) for m, s in v.items()}) for n, v in named.items()}
        return RecordDict({"hello": ConfigRecord(values)})

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        """Raises ValueError where the record is missing, incomplete, or says something impossible."""
        values = _record(content, "hello", cls)
        return cls(**(values | {name: _shapes(name, values[name]) for name in ("shapes", "heads")}))


@dataclass(frozen=True)
class Order:
    """What the server asks of one client in one round.

    `trains` are the names of the tensors that take gradients, `penalty` and `keep` those of the method's `ClientRule`.
    `fresh_round` seeds the fresh rows of A; `share` is the digest of what is sent, `model` that of the global model
    it was cut from: both come back with the reply. `run` names the run, also after it was resumed: what a client keeps
    from round to round it keeps by that name. `settings` is JSON that the application reads as it likes.
    """

    round: int
    rank: int
    trains: str
    fresh_round: int
    seed: int
    model: str
    share: str
    base_hash: str
    settings: str = "{}"
    penalty: float = 0.0
    keep: float = 1.0
    run: str = ""


@dataclass(frozen=True)
class Assignment:
    """An order with the factors that came with it."""

    order: Order
    frozen: AdapterState
    start: LowRankState

    def pack(self) -> RecordDict:
        """As the content of a `train` or `evaluate` message."""
        return RecordDict(
            {
                "frozen": pack_adapter(self.frozen),
                "start": pack_adapter(self.start),
                "order": ConfigRecord(asdict(self.order)),
            }
        )

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        """Raises ValueError for factors that are not what the server says it sent."""
        order = Order(**_record(content, "order", Order))
        frozen, start = (unpack_adapter(arrays_of(content, part)) for part in ("frozen", "start"))
        assignment = cls(order, frozen, low_rank(start))
        if share_digest(assignment.frozen, assignment.start) != order.share:
            raise ValueError(f"round {order.round}: the download must have the digest {order.share}, it was damaged")
        return assignment


def share_digest(frozen: AdapterState, start: LowRankState) -> str:
    """The digest of what one client downloads."""
    return GlobalModel(merged=frozen, start=start).digest()


@dataclass(frozen=True)
class Reply:
    """What `train` brings back: the adapter, what it was trained from, and numbers. No example leaves the client.

    Of the factors, those in `trains` travel: the server has the others.
    """

    client_id: str
    round: int
    model: str
    base_hash: str
    num_examples: int
    processed: int
    adapter: AdapterState
    metrics: Mapping[str, float] = field(default_factory=dict)
    trains: str = "AB"

    def pack(self) -> RecordDict:
        """As the content of the reply."""
        names = [f.name for f in fields(self) if f.name not in ("adapter", "metrics")]
        return RecordDict(
            {
                "adapter": pack_adapter(self.adapter, self.trains),
                "receipt": ConfigRecord({name: getattr(self, name) for name in names}),
                "metrics": MetricRecord({name: float(value) for name, value in self.metrics.items()}),
            }
        )

    @classmethod
    def unpack(cls, content: RecordDict, held: LowRankState = {}) -> Self:  # noqa: B006  (only read)
        """The reply, its fixed factors taken from `held`. Raises ValueError for a record missing or out of shape."""
        record, receipt = arrays_of(content), cls.unpack_receipt(content)
        named = {*receipt.trains, WHOLE}
        if odd := [key for key in unbundle(record) if key.rpartition("/")[2] not in named]:
            raise ValueError(f"the adapter must hold {receipt.trains} alone, got {odd[0]!r}")
        return replace(receipt, adapter=unpack_adapter(record, held))

    @classmethod
    def unpack_receipt(cls, content: RecordDict) -> Self:
        """The reply without its adapter: what can be checked before any array is read. Raises ValueError."""
        return cls(**_record(content, "receipt", cls), adapter={}, metrics=unpack_metrics(content))

    def update(self) -> ClientUpdate:
        """The part that aggregation needs."""
        return ClientUpdate(self.client_id, self.num_examples, self.adapter, self.metrics, self.processed)


def unpack_metrics(content: RecordDict) -> dict[str, float]:
    """The numbers of a reply, none if it has none. Raises ValueError for one that is not a finite number, is larger
    than LARGEST_NUMBER or has no usable name, and for more than MOST_NUMBERS."""
    record: Mapping[str, Any] = content.metric_records.get("metrics") or {}
    if len(record) > MOST_NUMBERS:
        raise ValueError(f"a reply may have {MOST_NUMBERS} metrics, got {len(record)}")
    for name, value in record.items():
        if not is_name(name):
            raise ValueError(f"a metric's name must be 1 to {LONGEST_NAME} printable characters, got {name!r}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"metric {name} must be finite, got {value}")
        if abs(value) > LARGEST_NUMBER:
            raise ValueError(f"metric {name} must be at most {LARGEST_NUMBER:g}, got {value:g}")
    return {name: float(value) for name, value in record.items()}


def is_name(text: str) -> bool:
    """Whether a metric or a module may be called so: it is shown, logged and written as it is."""
    return 0 < len(text) <= LONGEST_NAME and text.isprintable()


def _is_whole(value: Any) -> bool:
    """Whether it is a number of things: true is not 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shapes(name: str, text: str) -> dict[str, tuple[int, int]]:
    """Module -> (out, in), each from 1 to LARGEST."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"hello.{name} must be modules with (out, in), got JSON nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"hello.{name} must be modules with (out, in), got {type(value).__name__}")
    for module, shape in value.items():
        if not is_name(module):
            raise ValueError(f"a module's name must be 1 to {LONGEST_NAME} printable characters, got {module!r}")
        sound = isinstance(shape, list) and len(shape) == 2 and all(_is_whole(n) for n in shape)
        if not sound or not all(1 <= n <= LARGEST for n in shape):
            raise ValueError(f"hello.{name}.{module} must be (out, in) from 1 to {LARGEST}, got {shape!r}")
    return {str(module): (shape[0], shape[1]) for module, shape in value.items()}


def arrays_of(content: RecordDict, name: str = "adapter") -> ArrayRecord:
    """The arrays of that name. Raises ValueError where there are none."""
    if name not in content.array_records:
        raise ValueError(f"the message must hold the arrays {name!r}, got {sorted(content.array_records)}")
    return content.array_records[name]


def _record(content: RecordDict, name: str, kind: type) -> dict[str, Any]:
    """The scalar fields of `kind` from a config record: each there, each of its type."""
    if name not in content.config_records:
        raise ValueError(f"the message must hold the record {name!r}, got {sorted(content.config_records)}")
    record = content.config_records[name]
    values = {}
    for f in fields(kind):
        if f.name in ("adapter", "metrics"):
            continue
        wanted = f.type if f.type in (int, str, bool, float) else str
        if type(record.get(f.name)) is not wanted:  # and not isinstance: true would count as one example
            raise ValueError(f"{name}.{f.name} must be a {wanted.__name__}, got {record.get(f.name)!r}")
        values[f.name] = record[f.name]
    return values
