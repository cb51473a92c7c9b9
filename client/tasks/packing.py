"""Several examples in one row: nothing is padded, and none sees another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import pack_dataset

from corolla.client.tasks.task import IGNORED


@dataclass(frozen=True)
class PackedExample:
    """Sequences one after another; `lengths` are theirs, in tokens."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    group: str = ""

    @property
    def count(self) -> int:
        """Examples in it."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Tokens that the loss sees."""
        return sum(label != IGNORED for label in self.labels)

    def features(self) -> dict[str, Any]:
        """What SFTTrainer takes as it is."""
        names = {"input_ids": self.input_ids, "labels": self.labels, "seq_lengths": self.lengths}
        return {name: list(values) for name, values in names.items()}

    def sequences(self) -> Mapping[str, tuple[Sequence[int], Sequence[bool]]]:
        """The one sequence."""
        return {"": (self.input_ids, [label != IGNORED for label in self.labels])}


def pack(examples: Sequence[Any], size: int) -> tuple[PackedExample, ...]:
    """All of `examples`, each whole, in rows of at most `size` tokens (best fit, the longest first), by TRL.

    Raises ValueError for an example that is longer: TRL would cut it.
    """
    if longest := max((e.length for e in examples if e.length > size), default=0):
        raise ValueError(f"a packed row must hold its longest example, got {longest} tokens for rows of {size}")
    if not examples:
        return ()
    rows = [{"input_ids": list(e.input_ids), "labels": [IGNORED, *e.labels[1:]]} for e in examples]
    packed = pack_dataset(Dataset.from_list(rows), size, "bfd")
    return tuple(PackedExample(tuple(r["input_ids"]), tuple(r["labels"]), tuple(r["seq_lengths"])) for r in packed)
