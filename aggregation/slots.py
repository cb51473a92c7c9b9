"""Room for a round's replies, laid out as the stack that they will become."""

from collections.abc import Mapping

import torch

from corolla.aggregation.delta import AdapterState, LowRankDelta
from corolla.aggregation.state import Shapes


class Slots:
    """One A (R, in) and one B (out, R) per module, with a place for every client's components, in client-id order.

    Each reply is copied into its place as it comes and can be let go: nothing else of a round is held. What `put`
    returns are views of the places, and `stack` finds those of neighbours side by side, so that it need not copy A
    again. Memory: 4 · Σ r_k · (out + in) bytes a module, taken when its first reply comes.
    """

    def __init__(self, clients: Mapping[str, Shapes], ranks: Mapping[str, int]) -> None:
        self._first: dict[tuple[str, str], int] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._width: dict[str, int] = {}
        self._room: dict[str, LowRankDelta] = {}
        for client in sorted(clients):
            for module, shape in clients[client].items():
                self._first[client, module] = self._width.get(module, 0)
                self._width[module] = self._first[client, module] + ranks[client]
                self._last[client, module] = self._width[module]
                if self._shapes.setdefault(module, shape) != shape:
                    raise ValueError(
                        f"{module} must have one shape, got {self._shapes[module]} and {shape} of {client}"
                    )

    def put(self, client: str, adapter: AdapterState) -> dict[str, LowRankDelta]:
        """The same adapter, in its client's place.

        Raises KeyError for a client or module that has none, ValueError for factors that do not fit it.
        """
        placed = {}
        for module, delta in adapter.items():
            if not isinstance(delta, LowRankDelta):
                raise ValueError(f"a slot of {module} needs factors A and B, got {type(delta).__name__}")
            first = self._first[client, module]
            room = self._room_of(module)
            if delta.shape != room.shape or first + delta.rank > self._last[client, module]:
                raise ValueError(
                    f"the slot of {client} in {module} has rank {self._last[client, module] - first} and shape "
                    f"{room.shape}, got rank {delta.rank} and shape {delta.shape}"
                )
            a, b = room.A[first : first + delta.rank], room.B[:, first : first + delta.rank]
            a.copy_(delta.A)
            b.copy_(delta.B)
            placed[module] = LowRankDelta(a, b)
        return placed

    def _room_of(self, module: str) -> LowRankDelta:
        if module not in self._room:
            out, inn = self._shapes[module]
            width = self._width[module]
            self._room[module] = LowRankDelta(torch.empty(width, inn), torch.empty(out, width))
        return self._room[module]
