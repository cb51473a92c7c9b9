"""The wire: what goes in comes out, and nothing else comes in."""

from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.aggregation import GlobalModel, LowRankDelta
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
    array = content.array_records["frozen"]["model.layers.0.q/B"]
    content.array_records["frozen"]["model.layers.0.q/B"] = Array(
        dtype=array.dtype, shape=array.shape, stype=array.stype, data=b"\1" + array.data[1:]
    )
    with pytest.raises(ValueError, match="was damaged"):
        Assignment.unpack(content)


def changed(key: str, **changes) -> ArrayRecord:
    record = pack_adapter(ADAPTER)
    array = record[key]
    values = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes
    record[key] = Array(**values)
    return record


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
    record = pack_adapter(ADAPTER)
    del record["model.layers.0.q/B"]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q needs the tensors A\+B or W, got A"):
        unpack_adapter(record)
    record = pack_adapter(ADAPTER)
    record["extra"] = record["model.layers.0.q/A"]
    with pytest.raises(ValueError, match=r"extra needs the tensors .*, got extra"):
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
