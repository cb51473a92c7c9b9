"""The messages of a secure sum, as Flower records. None of them holds an adapter, or a vector without masks."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from corolla.client.protocol import Reply

KEYS, SHARES, REVEAL, PROJECT, END = (f"query.secure_{step}" for step in ("keys", "shares", "reveal", "project", "end"))
TRAIN = "train.secure"
"""Message types: publish keys; share out secrets; train and send Y; reveal shares (once a pass); send X; forget."""

MASKED = "corolla.masked.v1"
"""Serialisation type of integers modulo 2^bits, little-endian."""

BASES = "corolla.basis.v1"
"""That of float64 matrices, little-endian, row-major."""


def config(content: RecordDict, name: str, *keys: str) -> dict[str, Any]:
    """The values of a config record. Raises ValueError where it is missing, or one of `keys` is."""
    if name not in content.config_records:
        raise ValueError(f"the message must hold the record {name!r}, got {sorted(content.config_records)}")
    values = dict(content.config_records[name])
    if lacking := sorted(set(keys) - values.keys()):
        raise ValueError(f"{name} must have {', '.join(keys)}, got none of {', '.join(lacking)}")
    return values


def texts(content: RecordDict, name: str) -> dict[str, bytes]:
    """Client -> bytes from a config record. Raises ValueError for anything else."""
    values = config(content, name)
    if odd := sorted(client for client, value in values.items() if not isinstance(value, bytes)):
        raise ValueError(f"{name}.{odd[0]} must be bytes, got {type(values[odd[0]]).__name__}")
    return values


def pack_tensors(tensors: Mapping[str, Tensor], stype: str) -> ArrayRecord:
    """Tensors as raw bytes."""
    return ArrayRecord(
        {
            name: Array(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stype=stype,
                data=tensor.contiguous().numpy().tobytes(),
            )
            for name, tensor in tensors.items()
        }
    )


def unpack_tensor(
    content: RecordDict, record: str, name: str, stype: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """One tensor back. Raises ValueError where it is missing, or of another type or shape than this."""
    arrays: Mapping[str, Array] = content.array_records.get(record) or {}
    if name not in arrays:
        raise ValueError(f"the message must hold {record}/{name}, got {sorted(arrays)[:4]}")
    array = arrays[name]
    wanted = (stype, str(dtype).removeprefix("torch."), shape, math.prod(shape) * dtype.itemsize)
    got = (array.stype, array.dtype, tuple(array.shape), len(array.data))
    if wanted != got:
        raise ValueError(f"{record}/{name} must be {wanted}, got {got}")
    return torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(shape) if wanted[3] else torch.zeros(shape)


@dataclass(frozen=True)
class Receipt:
    """What a client's first vector was made from."""

    client_id: str
    round: int
    model: str
    base_hash: str

    @classmethod
    def of(cls, reply: Reply) -> Self:
        """That of a reply in the clear."""
        return cls(**{field.name: getattr(reply, field.name) for field in fields(cls)})

    def pack(self, masked: Tensor, metrics: Mapping[str, float]) -> RecordDict:
        """With the masked vector, and the numbers of training, which are in the clear."""
        return RecordDict(
            {
                "receipt": ConfigRecord(asdict(self)),
                "metrics": MetricRecord({name: float(value) for name, value in metrics.items()}),
                "masked": pack_tensors({"vector": masked}, MASKED),
            }
        )

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        """Raises ValueError where it is missing or incomplete."""
        names = [field.name for field in fields(cls)]
        values = config(content, "receipt", *names)
        return cls(**{name: values[name] for name in names})
