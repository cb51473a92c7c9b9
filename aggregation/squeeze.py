"""LoRA-Squeeze over rounds: the rank of what is merged falls in stages (arXiv:2602.10993)."""

from dataclasses import dataclass

from corolla.aggregation.lowrank import Budget


def halved(first: int, last: int) -> tuple[int, ...]:
    """`first`, its half, … down to at least `last`. Raises ValueError unless first >= last > 0."""
    if not first >= last > 0:
        raise ValueError(f"ranks that are halved must fall, got {first}..{last}")
    ranks = [first]
    while ranks[-1] // 2 >= last:
        ranks.append(ranks[-1] // 2)
    return tuple(ranks)


def parse_halved(text: str) -> tuple[int, ...]:
    """ "64..8" -> (64, 32, 16, 8). Raises ValueError for anything else."""
    first, dots, last = text.strip().partition("..")
    if not (dots and first.isdigit() and last.isdigit()):
        raise ValueError(f"ranks that are halved are written as '64..8', got {text!r}")
    return halved(int(first), int(last))


@dataclass(frozen=True)
class Squeeze:
    """A budget that gets smaller: of `rounds` rounds, each of `ranks` is the limit in an equal part, in their order.

    Training goes on from a high rank and ends at the rank that is wanted, which loses less than one cut at the end.
    What each cut loses is in the round's certificate. A run that goes on beyond `rounds` keeps the last rank.
    """

    ranks: tuple[int, ...]
    rounds: int

    def at(self, round_number: int) -> Budget:
        """The budget of round `round_number`, from 1 on."""
        stage = (round_number - 1) * len(self.ranks) // self.rounds
        return Budget(self.ranks[min(stage, len(self.ranks) - 1)])
