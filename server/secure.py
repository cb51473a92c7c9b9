"""The server's part in a round of secure sums: it routes what is sealed, adds what is masked, and opens sums alone."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.serverapp import Grid
from torch import Tensor

from corolla.client.secure.keys import KeyPair, commitment
from corolla.client.secure.masks import (
    Pass,
    PublicKeys,
    require_enough,
    require_no_small_difference,
    session_name,
)
from corolla.client.secure.plan import SumPlan
from corolla.client.secure.protocol import (
    BASES,
    END,
    KEYS,
    MASKED,
    PROJECT,
    REVEAL,
    SHARES,
    config,
    pack_tensors,
    texts,
    unpack_tensor,
)
from corolla.client.secure.session import keys_of, text_of
from corolla.server.fleet import Fleet
from corolla.server.validation import Rejected, reason_of

T = TypeVar("T")

SHARE = 52
"""Bytes of a share of 32: four of its number, then three blocks of 16."""


class SecureSumFailed(ArithmeticError):
    """The round has no sum; the message is the reason, and the model stays as it was."""


@dataclass(frozen=True)
class SumSettings:
    """How the sums are made: `sketch` columns (None: as many as exactness needs); of n clients ⌈threshold · n⌉ can open
    a sum; numbers of `bits` bits up to `clip`; seconds that an exchange without training may take."""

    sketch: int | None = None
    threshold: float = 2 / 3
    bits: int = 64
    clip: float = 2.0**24
    deadline: float = 300.0

    def needed(self, clients: int) -> int:
        """How many of so many clients must help to open a sum: more than half of them, whatever the threshold."""
        return max(math.ceil(self.threshold * clients - 1e-9), clients // 2 + 1)


class SecureSums:
    """The exchanges of one round with clients of `fleet`.

    `lost` has the reason for every client that fell out, `summed` the clients of the first sum, `survivors` those of
    the latest.

    All methods raise SecureSumFailed where too few clients are left.
    """

    def __init__(self, grid: Grid, fleet: Fleet, run: str, number: int, settings: SumSettings) -> None:
        self.grid, self.fleet, self.run, self.number, self.settings = grid, fleet, run, number, settings
        self.lost: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self.bytes_down: dict[str, int] = {}
        self.threshold = settings.needed(1)
        self.summed: tuple[str, ...] = ()
        self.survivors: tuple[str, ...] = ()
        self._roster: dict[str, PublicKeys] = {}
        self._group: tuple[str, ...] = ()

    def agree(self, clients: Collection[str]) -> dict[str, dict[str, bytes]]:
        """client -> (sender -> sealed shares), for those that published keys and shared their secrets out."""
        self.threshold = self.settings.needed(len(clients))
        content = {"secure": ConfigRecord({"run": self.run, "round": self.number})}
        self._roster = self._ask(KEYS, clients, content, _read_keys)
        self._require(self._roster)
        told = {"secure": ConfigRecord({"roster": text_of(self._roster), "threshold": self.threshold})}
        sealed = self._ask(SHARES, self._roster, told, self._sealed)
        self._require(sealed)
        self._group = tuple(sealed)
        return {c: {sender: sealed[sender][c] for sender in sealed if sender != c} for c in sealed}

    def first(self, vectors: Mapping[str, Tensor], plan: SumPlan) -> Tensor:
        """The sum of the first vectors, decoded."""
        total = self._open(0, vectors, plan)
        self.summed = self.survivors
        return total

    def second(self, bases: Mapping[str, Tensor], plan: SumPlan) -> Tensor:
        """The sum of the second vectors, decoded."""
        self._require(self._group)
        self._differ(self._group)
        content = {
            "secure": ConfigRecord({"group": list(self._group)}),
            "bases": pack_tensors(bases, BASES),
        }
        for client in self._group:
            self.bytes_down[client] = sum(8 * q.numel() for q in bases.values())
        size = plan.sizes()[1]
        vectors = self._ask(PROJECT, self._group, content, lambda client, c: self.vector(client, c, size, plan))
        return self._open(1, vectors, plan)

    def vector(self, client: str, content: RecordDict, size: int, plan: SumPlan) -> Tensor:
        """A client's masked vector. Raises ValueError for one of another type or size."""
        vector = unpack_tensor(content, "masked", "vector", MASKED, plan.numbers.dtype, (size,))
        self.bytes_up[client] = self.bytes_up.get(client, 0) + vector.nbytes
        return vector

    def end(self) -> None:
        """Asks all clients of a round that failed to forget it."""
        self._ask(END, self._roster, {}, lambda client, content: None)

    def _open(self, number: int, vectors: Mapping[str, Tensor], plan: SumPlan) -> Tensor:
        """The decoded sum of the vectors of a pass."""
        name = session_name(self.run, self.number, self._roster, self.threshold)
        now = Pass(name, number, tuple(sorted(self._group)))
        self._require(vectors)
        self.survivors = tuple(sorted(vectors))
        if number == 1:
            self._differ(vectors)
        told = {"secure": ConfigRecord({"survivors": list(self.survivors)})}
        shares = self._ask(REVEAL, vectors, told, lambda c, content: self._shares(c, content, now))
        if len(shares) < self.threshold:
            raise SecureSumFailed(f"a sum opens with the shares of {self.threshold} clients, got {len(shares)}")
        self._group = tuple(sorted(shares))
        return plan.numbers.decode(self._unmask(now, vectors, list(shares.values())))

    def _shares(self, client: str, content: RecordDict, now: Pass) -> dict[str, bytes]:
        """A client's shares, one for each of the pass. Raises ValueError for others, or for another client's."""
        shares = texts(content, "shares")
        if shares.keys() != set(now.group):
            raise Rejected(f"shares must be of {', '.join(now.group)}, got those of {', '.join(sorted(shares))}")
        index = sorted(self._roster).index(client) + 1
        if odd := [name for name, s in shares.items() if len(s) != SHARE or int.from_bytes(s[:4], "little") != index]:
            raise Rejected(
                f"shares of {client} must have {SHARE} bytes and the number {index}, got another of {odd[0]}"
            )
        return shares

    def _unmask(self, now: Pass, vectors: Mapping[str, Tensor], shares: list[dict[str, bytes]]) -> Tensor:
        """Σ vectors less the survivors' own masks, and less what they share with those that are lost."""
        total = torch.stack([vectors[client] for client in sorted(vectors)]).sum(0, dtype=_dtype(vectors))
        count, dtype = total.numel(), total.dtype
        publics = {client: self._roster[client].masks[now.number] for client in vectors}
        for client in now.group:
            secret = self._secret(now, client, client in vectors, [of[client] for of in shares[: self.threshold]])
            if client in vectors:
                total = total - now.own(client, secret, count, dtype)
            else:
                total = total + now.pairwise(client, KeyPair.of(secret), publics, count, dtype)
        return total

    def _secret(self, now: Pass, client: str, survived: bool, shares: list[bytes]) -> bytes:
        """A survivor's seed, or the mask key of one that is lost: what the client's public keys say it is."""
        keys = self._roster[client]
        try:
            secret = combine_shares(shares)
            right = (
                commitment(secret) == keys.seeds[now.number]
                if survived
                else KeyPair.of(secret).public == keys.masks[now.number]
            )
        except ValueError:
            right = False
        if not right:
            raise SecureSumFailed(f"the shares of {client}'s secret must give it, got another: one was changed")
        return secret

    def _differ(self, group: Collection[str]) -> None:
        try:
            require_no_small_difference(self.summed, group)
        except ValueError as error:
            raise SecureSumFailed(str(error)) from error

    def _require(self, clients: Collection[str]) -> None:
        try:
            require_enough(clients, self.threshold, "a secure sum")
        except ValueError as error:
            raise SecureSumFailed(str(error)) from error

    def _ask(
        self, kind: str, clients: Collection[str], records: Mapping[str, Any], read: Callable[[str, RecordDict], T]
    ) -> dict[str, T]:
        """What `read` makes of the clients' replies, sorted; who does not answer soundly is in `lost`."""
        seconds = self.settings.deadline
        messages = [
            Message(
                RecordDict({name: record.copy() for name, record in records.items()}),
                dst_node_id=self.fleet.node(client),
                message_type=kind,
                group_id=f"{self.number}:{client}",
                ttl=seconds,
            )
            for client in sorted(clients)
        ]
        found = self.read(self.grid.send_and_receive(messages, timeout=seconds), clients, read)
        for client in set(clients) - found.keys():
            self.lose(client, f"no reply to {kind} within {seconds:g} s")
        return found

    def _sealed(self, client: str, content: RecordDict) -> dict[str, bytes]:
        """Raises ValueError for shares that are not for all others of the roster."""
        sealed = texts(content, "sealed")
        if sealed.keys() != self._roster.keys() - {client}:
            raise Rejected(f"{client} must share its secrets with all others, got shares for {sorted(sealed)}")
        return sealed

    def read(
        self, replies: Iterable[Message], asked: Collection[str], read: Callable[[str, RecordDict], T]
    ) -> dict[str, T]:
        """As `_ask`, of replies to messages that were sent elsewhere; the first of a client counts."""
        found: dict[str, T] = {}
        for message in replies:
            client = message.metadata.group_id.partition(":")[2]
            if client not in asked or client in found:
                continue
            try:
                if message.has_error():
                    raise Rejected(f"the client failed: {message.error.reason or message.error.code}")
                if message.metadata.src_node_id != self.fleet.node(client):
                    raise Rejected(f"node {message.metadata.src_node_id} answered in its place")
                found[client] = read(client, message.content)
            except ValueError as error:
                self.lose(client, str(error))
            except Exception as error:  # whatever one client's bytes do to this code, the round is the others' too
                log(40, "a message of %s cannot be read: a mistake of the server's", client, exc_info=True)
                self.lose(client, f"its message cannot be read: {type(error).__name__}: {error}")
        return {client: found[client] for client in sorted(found)}

    def lose(self, client: str, reason: str) -> None:
        """Notes why a client fell out, in one line; the first reason counts."""
        reason = reason_of(reason)
        if client not in self.lost:
            log(30, "round %d: %s falls out of the secure sum: %s", self.number, client, reason)
        self.lost.setdefault(client, reason)


def _read_keys(client: str, content: RecordDict) -> PublicKeys:
    """Raises ValueError for keys of another client, what are none, and those that nobody can agree on a secret with:
    every other client would fail over them."""
    text = config(content, "keys", "json")["json"]
    try:
        published = json.loads(text)
    except (TypeError, RecursionError) as error:
        raise Rejected(f"keys must be flat JSON, got {type(text).__name__}: {error}") from error
    if not isinstance(published, dict) or published.keys() != {client}:
        raise Rejected(f"keys must be those of {client}, got others")
    keys = keys_of(published[client])
    for key in (keys.channel, *keys.masks):
        try:
            KeyPair.new().agree(key, "check")
        except ValueError as error:
            raise Rejected(f"a public key of {client} must be a point of large order, got {key.hex()}") from error
    return keys


def _dtype(vectors: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(vectors.values())).dtype
