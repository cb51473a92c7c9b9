"""Masks that cancel: between every two clients one that the first adds and the second takes off, and one of each
client's own (Bonawitz et al. 2017, doi:10.1145/3133956.3133982)."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from corolla.client.secure.keys import KeyPair, derive, keystream

LEAST = 3
"""No sum is of fewer clients: of a sum of two, each of the two knows the other's part."""


@dataclass(frozen=True)
class PublicKeys:
    """What a client publishes for one round: the key that its shares travel under, and for each of the two passes the
    key of its pairwise masks and the commitment to the seed of its own mask."""

    channel: bytes
    masks: tuple[bytes, bytes]
    seeds: tuple[bytes, bytes]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()


def session_name(run: str, round_number: int, roster: Mapping[str, PublicKeys], threshold: int) -> str:
    """The name of a round among these clients: clients that were told different rosters have no key in common."""
    keys = [[client, roster[client].digest()] for client in sorted(roster)]
    text = json.dumps([run, round_number, threshold, keys])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Pass:
    """One of the two passes of a session: its number, 0 or 1, and the clients whose masks are in the sum."""

    session: str
    number: int
    group: tuple[str, ...]

    def purpose(self, *names: str) -> str:
        """What a key is for; the group is part of it, so that it is good for the sum of this group alone."""
        return json.dumps(["corolla mask", self.session, self.number, sorted(self.group), *names])

    def own(self, client: str, seed: bytes, count: int, dtype: torch.dtype) -> Tensor:
        """The mask of the client's own."""
        return keystream(derive(seed, self.purpose(client)), count, dtype)

    def pairwise(
        self, client: str, pair: KeyPair, others: Mapping[str, bytes], count: int, dtype: torch.dtype
    ) -> Tensor:
        """Σ of the client's masks with `others` (name -> public key): added where its name is the smaller one."""
        total = torch.zeros(count, dtype=dtype)
        for other in sorted(others):
            key = pair.agree(others[other], self.purpose(*sorted((client, other))))
            mask = keystream(key, count, dtype)
            total = total + mask if client < other else total - mask
        return total


def require_enough(clients: Collection[str], threshold: int, what: str) -> None:
    """Raises ValueError for fewer clients than the threshold, or than LEAST."""
    least = max(LEAST, threshold)
    if len(set(clients)) < least:
        raise ValueError(
            f"{what} needs at least {least} clients, got {len(set(clients))}: {', '.join(sorted(clients))}"
        )


def require_no_small_difference(first: Collection[str], second: Collection[str]) -> None:
    """Raises ValueError where one or two clients of the first pass lack in the second.

    The first sum less the second one's sketch is the sketch of those: a sum of fewer than LEAST.
    """
    lost = sorted(set(first) - set(second))
    if 0 < len(lost) < LEAST:
        raise ValueError(
            f"the clients lost between the passes must be none or at least {LEAST}, got {', '.join(lost)}: the "
            f"difference of the two sums would be theirs alone"
        )
