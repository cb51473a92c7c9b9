"""What a person sees of data: examples with what the loss sees of them, and who holds what."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corolla.client.config import DataConfig, client_name
from corolla.client.data.load import Encoded, client_sources

Span = tuple[str, bool]
"""Text, and whether the loss sees it."""

ROWS = "rows"


def spans(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> list[Span]:
    """A sequence as text, cut where the loss begins or ends to see it."""
    found: list[Span] = []
    first = 0
    for last in range(1, len(ids) + 1):
        if last == len(ids) or learned[last] != learned[first]:
            found.append((tokenizer.decode(list(ids[first:last])), bool(learned[first])))
            first = last
    return found


def shown_examples(encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, list[Span]]]:
    """The first `count` examples: name of each of their sequences -> its spans."""
    return [
        {name: spans(tokenizer, ids, learned) for name, (ids, learned) in example.sequences().items()}
        for example in encoded.examples[:count]
    ]


@dataclass(frozen=True)
class Holdings:
    """Client -> value of `column` -> number of training rows, and client -> number of held-out rows."""

    column: str
    train: Mapping[str, Mapping[str, int]]
    held_out: Mapping[str, int]

    @property
    def values(self) -> list[str]:
        """All values, sorted."""
        return sorted({value for counts in self.train.values() for value in counts})


def holdings(config: DataConfig, clients: int, seed: int) -> Holdings:
    """Who holds what of the data that simulated clients share, by data.partition_column, data.group or "label".

    Raises what `load_client_data` raises for files and columns; no row is tokenized.
    """
    train: dict[str, Counter[str]] = {}
    held_out: dict[str, int] = {}
    column = ROWS
    for number in range(clients):
        name = client_name(number)
        mine, other = client_sources(config, name, number, clients, seed)
        there = [c for c in (config.partition_column, config.group, "label") if c in mine.rows.column_names]
        column = there[0] if there else ROWS
        train[name] = Counter(map(str, mine.rows[column])) if there else Counter({ROWS: len(mine)})
        held_out[name] = len(other) if other else 0
    return Holdings(column, train, held_out)
