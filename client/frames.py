"""Records as a stream of frames: an outline without the arrays' bytes, then those bytes in pieces.

A protobuf message ends at 2 GiB and gRPC copies each whole; an adapter's arrays may be larger, and go piece by piece.
"""

from collections.abc import Iterable, Iterator
from io import BytesIO

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

PIECE = 2**20
"""Bytes in a frame at the most, but for the outline."""

OUTLINE = b"\x01"
"""Begins the outline: that of no records at all has no bytes of its own, and an empty frame ends a part of a stream."""


def to_frames(content: RecordDict) -> Iterator[bytes]:
    """The outline, then all arrays' bytes in the order of the outline."""
    arrays = [array for record in content.array_records.values() for array in record.values()]
    yield OUTLINE + _outline(content).SerializeToString()
    for array in arrays:
        view = memoryview(array.data)
        for begin in range(0, len(view), PIECE):
            yield bytes(view[begin : begin + PIECE])


def _outline(content: RecordDict) -> RecordDictProto:
    """The records with every array's length in place of its bytes."""
    records = dict(content.items())
    for name, record in content.array_records.items():
        records[name] = ArrayRecord(
            {key: Array(a.dtype, a.shape, a.stype, str(len(a.data)).encode()) for key, a in record.items()}
        )
    return recorddict_to_proto(RecordDict(records))


def from_frames(frames: Iterable[bytes]) -> RecordDict:
    """The records back. Raises ValueError where the stream ends early, goes on too long or begins with no outline."""
    pieces = iter(frames)
    if not (outline := next(pieces, b"")).startswith(OUTLINE):
        raise ValueError(f"frames must begin with an outline, got {len(outline)} bytes of another kind")
    content = recorddict_from_proto(RecordDictProto.FromString(outline.removeprefix(OUTLINE)))
    for record in content.array_records.values():
        for key, array in list(record.items()):
            record[key] = Array(array.dtype, array.shape, array.stype, _gather(pieces, int(array.data), key))
    if next(pieces, None) is not None:
        raise ValueError("the frames must end with the last array, got more")
    return content


def _gather(pieces: Iterator[bytes], size: int, key: str) -> bytes:
    data = BytesIO()  # whose value is no copy
    while (got := data.tell()) < size:
        if not (piece := next(pieces, b"")):
            raise ValueError(f"{key} must have {size} bytes, got {got} before the stream ended")
        data.write(piece)
    if got > size:
        raise ValueError(f"{key} must have {size} bytes, got {got}")
    return data.getvalue()
