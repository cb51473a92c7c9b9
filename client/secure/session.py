"""What one client knows and may still do in one round of secure sums: every step once, in order."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from flwr.common.secure_aggregation.crypto.shamir import create_shares
from torch import Tensor

from corolla.client.secure.keys import KeyPair, commitment, new_seed, seal, unseal
from corolla.client.secure.masks import (
    Pass,
    PublicKeys,
    require_enough,
    require_no_small_difference,
    session_name,
)

STEPS = ("keys", "shares", "opened", "masked 1", "revealed 1", "masked 2", "revealed 2")
"""The steps of a round, in order."""

SECRETS = 4
"""Secrets that are shared out: for each of the two passes the mask key and the seed."""


@dataclass(frozen=True)
class Session:
    """The secrets of one client in one round, and how far it has come.

    `held` are the shares of the others' secrets (name -> key 1, seed 1, key 2, seed 2), `group` the clients of the pass
    that is on, `summed` those whose first vectors were summed. It lives in the node's memory and is never written to
    disk: whoever has it together with the client's masked vector has the vector.
    """

    client: str
    run: str
    round: int
    channel: KeyPair
    masks: tuple[KeyPair, KeyPair]
    seeds: tuple[bytes, bytes]
    step: str = "keys"
    threshold: int = 0
    roster: Mapping[str, PublicKeys] = field(default_factory=dict)
    held: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    group: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()

    @classmethod
    def new(cls, client: str, run: str, round_number: int) -> Self:
        """Fresh secrets, independent for the two passes: what opens one says nothing about the other."""
        seeds = (new_seed(), new_seed())
        return cls(client, run, round_number, KeyPair.new(), (KeyPair.new(), KeyPair.new()), seeds)

    def public(self) -> PublicKeys:
        """What the others may know."""
        first, second = self.masks
        return PublicKeys(
            self.channel.public, (first.public, second.public), (commitment(self.seeds[0]), commitment(self.seeds[1]))
        )

    @property
    def name(self) -> str:
        """The session, as all clients of one roster name it."""
        return session_name(self.run, self.round, self.roster, self.threshold)

    def share(self, roster: Mapping[str, PublicKeys], threshold: int) -> tuple[Self, dict[str, bytes]]:
        """Shares of the four secrets, `threshold` of which are needed, sealed for each client of the roster.

        Raises ValueError for a roster that is too small or has not this client's keys, keys that come twice, or a
        threshold of no more than half: two halves could open both secrets of a client.
        """
        self._require("keys")
        require_enough(roster, threshold, "a roster")
        if 2 * threshold <= len(roster):
            raise ValueError(f"the threshold must be more than half of {len(roster)} clients, got {threshold}")
        if roster.get(self.client) != self.public():
            raise ValueError(f"the roster must hold the keys of {self.client} as it sent them, got others")
        if len({keys.digest() for keys in roster.values()}) < len(roster):
            raise ValueError("every client of a roster has keys of its own, got some twice")
        names = sorted(roster)
        after = replace(self, step="shares", roster=dict(roster), threshold=threshold)
        shares = [create_shares(secret, threshold, len(names)) for secret in self._secrets()]
        parts = {name: tuple(of_one[i] for of_one in shares) for i, name in enumerate(names)}
        sealed = {
            name: seal(after._channel_to(name, self.client), b"".join(parts[name]), after._about(self.client, name))
            for name in names
            if name != self.client
        }
        return replace(after, held={self.client: parts[self.client]}), sealed

    def open(self, sealed: Mapping[str, bytes]) -> Self:
        """With the shares of the others (name -> sealed); those whose shares came are the group of the first pass.

        Raises ValueError for shares that were changed, or meant for another, and for too few.
        """
        self._require("shares")
        if odd := sorted(sealed.keys() - self.roster.keys() | sealed.keys() & {self.client}):
            raise ValueError(f"shares come from other clients of the roster, got some of {odd[0]}")
        require_enough({*sealed, self.client}, self.threshold, "a secure sum")
        held = dict(self.held)
        for name in sorted(sealed):
            text = unseal(self._channel_to(name, name), sealed[name], self._about(name, self.client))
            size = len(text) // SECRETS
            held[name] = tuple(text[i * size : (i + 1) * size] for i in range(SECRETS))
        return replace(self, step="opened", held=held, group=tuple(sorted(held)))

    def mask(self, vector: Tensor, group: Collection[str]) -> tuple[Self, Tensor]:
        """The integers of the pass that is next, masked for the sum over `group`. A pass masks one vector, once: the
        difference of two under the same masks would be in the open.

        Raises ValueError for a group that is too small, has not this client, or is not of those of the pass before.
        """
        number = 0 if self.step == "opened" else 1
        self._require("opened" if number == 0 else "revealed 1")
        if self.client not in group or not set(group) <= set(self.group):
            raise ValueError(f"the sum must be over {self.client} and others of {', '.join(self.group)}, got {group}")
        require_enough(group, self.threshold, "a secure sum")
        if number == 0 and set(group) != set(self.group):
            raise ValueError("the first pass sums all whose shares came, got fewer")
        if number == 1:
            require_no_small_difference(self.summed, group)
        now, count = Pass(self.name, number, tuple(sorted(group))), vector.numel()
        others = {name: self.roster[name].masks[number] for name in group if name != self.client}
        masked = vector + now.own(self.client, self.seeds[number], count, vector.dtype)
        masked = masked + now.pairwise(self.client, self.masks[number], others, count, vector.dtype)
        return replace(self, step=f"masked {number + 1}", group=now.group), masked

    def reveal(self, survivors: Collection[str]) -> tuple[Self, dict[str, bytes]]:
        """For each client of the pass one share: of its seed where its vector came, of its mask key where not.

        Never both of one client: a pass is revealed once, by which client is in which of two sets without overlap.
        Raises ValueError for survivors that are not of the group, too few, or few less than in the first pass.
        """
        number = 0 if self.step == "masked 1" else 1
        self._require(f"masked {number + 1}")
        if not set(survivors) <= set(self.group):
            raise ValueError(f"survivors must be of {', '.join(self.group)}, got {', '.join(sorted(survivors))}")
        require_enough(survivors, self.threshold, "a secure sum")
        if number == 1:
            require_no_small_difference(self.summed, survivors)
        shares = {name: self.held[name][2 * number + (name in survivors)] for name in self.group}
        left = tuple(sorted(survivors))
        summed = left if number == 0 else self.summed
        return replace(self, step=f"revealed {number + 1}", group=left, summed=summed), shares

    def to_json(self) -> str:
        """For the node's memory."""
        return json.dumps(_hex(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        values = json.loads(text)
        pairs = {name: KeyPair.of(bytes.fromhex(values[name]["private"])) for name in ("channel",)}
        first, second = (KeyPair.of(bytes.fromhex(pair["private"])) for pair in values["masks"])
        roster = {client: keys_of(keys) for client, keys in values["roster"].items()}
        held = {client: tuple(map(bytes.fromhex, shares)) for client, shares in values["held"].items()}
        one, two = map(bytes.fromhex, values["seeds"])
        sets = {name: tuple(values[name]) for name in ("group", "summed")}
        known = {"masks": (first, second), "roster": roster, "held": held, "seeds": (one, two)}
        return cls(**(values | pairs | known | sets))

    def _secrets(self) -> tuple[bytes, ...]:
        return (self.masks[0].private, self.seeds[0], self.masks[1].private, self.seeds[1])

    def _channel_to(self, other: str, sender: str) -> bytes:
        purpose = json.dumps(["corolla shares", self.name, sender])
        return self.channel.agree(self.roster[other].channel, purpose)

    def _about(self, sender: str, receiver: str) -> str:
        return f"shares of {sender} for {receiver} in session {self.name}"

    def _require(self, step: str) -> None:
        if self.step != step:
            raise ValueError(
                f"{self.client} must have done {step!r} of round {self.round} last, got {self.step!r}: every step of a "
                "secure sum is done once, in order"
            )


def keys_of(values: Mapping[str, Any]) -> PublicKeys:
    """Public keys from hexadecimal text by name. Raises ValueError for what is none."""
    try:
        (one, two), (three, four) = values["masks"], values["seeds"]
        texts = [bytes.fromhex(text) for text in (values["channel"], one, two, three, four)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"public keys must be a channel, two mask keys and two commitments, got {error}") from error
    if any(len(text) != 32 for text in texts):
        raise ValueError(f"a key and a commitment have 32 bytes, got {[len(text) for text in texts]}")
    return PublicKeys(texts[0], (texts[1], texts[2]), (texts[3], texts[4]))


def text_of(roster: Mapping[str, PublicKeys]) -> str:
    """A roster as it travels."""
    return json.dumps({client: _hex(asdict(keys)) for client, keys in roster.items()})


def _hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _hex(part) for name, part in value.items()}
    return [_hex(part) for part in value] if isinstance(value, list | tuple) else value
