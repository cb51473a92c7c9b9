"""The wire: what goes in comes out, and nothing else comes in."""

from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import GlobalModel, LowRankDelta
from corolla.client.bundle import BUNDLE, bundle, unbundle
from corolla.client.bundle import STYPE as BUNDLE_TYPE
from corolla.client.protocol import (
    Assignment,
    Hello,
    Order,
    Reply,
    adapter_bytes,
    pack_adapter,
    share_digest,
    unpack_adapter,
)
from tests.aggregation.federations import random_delta

ADAPTER = {"model.layers.0.q": random_delta(5, 4, 3, 1), "model/with/slashes": random_delta(2, 4, 1, 2)}
REPLY = Reply("client-001", 3, "model-digest", "base-hash", 12, 8, ADAPTER, {"train_loss": 0.5})


def digest(adapter) -> str:
    return GlobalModel(merged=adapter).digest()


def order(**changes) -> Order:
    plain = Order(1, 4, "AB", 1, 0, "model", share_digest(ADAPTER, {}), "base")
    return replace(plain, **changes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_factors_come_back_bit_for_bit(rank, out, inn, seed):
    delta = random_delta(out, inn, rank, seed)
    sliced = LowRankDelta(delta.A.T.contiguous().T, delta.B.T.contiguous().T)  # not contiguous
    record = pack_adapter({"m": sliced})
    back = unpack_adapter(record)["m"]
    assert torch.equal(back.A, delta.A)
    assert torch.equal(back.B, delta.B)
    assert adapter_bytes(record) == 4 * rank * (out + inn)


def test_messages_come_back():
    hello = Hello("client-001", 4, "base", 7, {"model.q": (5, 4)})
    assert Hello.unpack(hello.pack()) == hello
    back = Reply.unpack(REPLY.pack())
    assert digest(back.adapter) == digest(ADAPTER)
    assert replace(back, adapter={}) == replace(REPLY, adapter={})
    assignment = Assignment.unpack(Assignment(order(), ADAPTER, {}).pack())
    assert assignment.order == order()
    assert digest(assignment.frozen) == digest(ADAPTER)


def test_a_damaged_download_is_noticed():
    content = Assignment(order(), ADAPTER, {}).pack()
    parts = unbundle(content.array_records["frozen"])
    damaged = b"\1" + bytes(parts["model.layers.0.q/B"].data[1:])
    parts["model.layers.0.q/B"] = replace(parts["model.layers.0.q/B"], data=damaged)
    content["frozen"] = bundle(parts.items())
    with pytest.raises(ValueError, match="was damaged"):
        Assignment.unpack(content)


def changed(key: str, **changes) -> ArrayRecord:
    parts = unbundle(pack_adapter(ADAPTER))
    return bundle((parts | {key: replace(parts[key], **changes)}).items())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            changed("model.layers.0.q/A", data=b"12"),
            r"model\.layers\.0\.q/A of shape \(3, 4\) must have 48 bytes, got 2",
        ),
        (changed("model.layers.0.q/A", dtype="float64"), r"must be float32 .*got float64"),
        (changed("model.layers.0.q/A", stype="numpy.ndarray"), r"got float32 of type numpy\.ndarray"),
        (changed("model.layers.0.q/A", shape=(4, 3)), r"model\.layers\.0\.q: .*share the rank"),
        (changed("model.layers.0.q/A", shape=(12,)), r"must be a matrix"),
    ],
)
def test_factors_out_of_shape_are_refused_by_name(record, message):
    with pytest.raises(ValueError, match=message):
        unpack_adapter(record)


def test_a_factor_alone_or_of_another_name_is_refused():
    parts = unbundle(pack_adapter(ADAPTER))
    alone = parts.pop("model.layers.0.q/B")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q needs the tensors A\+B or W.*, got A"):
        unpack_adapter(bundle(parts.items()))
    with pytest.raises(ValueError, match=r"extra needs the tensors .*, got extra"):
        unpack_adapter(bundle({**unbundle(pack_adapter(ADAPTER)), "extra": alone}.items()))


def forged(head: bytes, rest: bytes = b"") -> ArrayRecord:
    data = len(head).to_bytes(8, "little") + head + rest
    return ArrayRecord({BUNDLE: Array(dtype="uint8", shape=(len(data),), stype=BUNDLE_TYPE, data=data)})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ArrayRecord(), "must come as one of type corolla.bundle.v1, got none"),
        (ArrayRecord({"x": Array("uint8", (1,), "numpy.ndarray", b"1")}), "got 'x' of type 'numpy.ndarray'"),
        (ArrayRecord({BUNDLE: Array("uint8", (3,), BUNDLE_TYPE, b"abc")}), "must hold its list"),
        (ArrayRecord({BUNDLE: Array("uint8", (9,), BUNDLE_TYPE, b"\xff" * 9)}), "must hold its list"),
        (forged(b"{}"), "needs a list of arrays, got dict"),
        (forged(b"[" * 100_000), "nested too deep|Expecting value"),
        (forged(b"no json"), "Expecting value"),
        (forged(b'[["m/A", "float32", [1, 1], "t", true]]'), "needs name, dtype, shape, type and bytes"),
        (forged(b'[["m/A", "float32", [1, 1], "t", -4]]'), "needs name, dtype, shape, type and bytes"),
        (forged(b"[7]"), "needs name, dtype, shape, type and bytes"),
        (forged(b'[["m/A", "float32", [1, 1], "t", 4]]', b"12345"), "must hold 48 bytes by its list, got 49"),
        (forged(b'[["m/A", "float32", [1, 1], "t", 4]]', b"123"), "must hold 48 bytes by its list, got 47"),
        (forged(b'[["m/A", "f", [1, 1], "t", 1], ["m/A", "f", [1, 1], "t", 1]]', b"12"), "'m/A' twice"),
    ],
)
def test_what_is_no_bundle_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        unpack_adapter(record)


def test_a_reply_without_its_records_is_refused():
    content = REPLY.pack()
    content.config_records["receipt"] = ConfigRecord({"client_id": "client-001", "round": "three"})
    with pytest.raises(ValueError, match=r"receipt\.round must be a int, got 'three'"):
        Reply.unpack(content)
    with pytest.raises(ValueError, match="arrays 'adapter'"):
        Reply.unpack(RecordDict())


def test_a_stock_strategy_raises_instead_of_averaging():
    content = REPLY.pack()
    with pytest.raises(Exception, match=r"(?i)corolla|stype|ndarray"):
        aggregate_arrayrecords([RecordDict({k: content[k] for k in ("adapter", "metrics")})], "train_loss")
