"""What a method is: a value with three parts, and whether it can mix ranks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate, Shapes


@dataclass(frozen=True)
class Method:
    """One way to aggregate.

    `initial(shapes, max_rank, seed)` is the model before round 1; `constrain(round)` says what clients may train;
    `aggregate(updates, weights, model)` is one round's outcome, a pure function of its arguments. Where
    `mixed_ranks` is false, all clients must have one rank and one set of modules; with a `common_start` the server
    hands out A from round one, so clients cannot draw their own.
    """

    name: str
    initial: Callable[[Shapes, int, int], GlobalModel]
    constrain: Callable[[int], ClientRule]
    aggregate: Callable[[Sequence[ClientUpdate], Mapping[str, float], GlobalModel], GlobalUpdate]
    mixed_ranks: bool = True
    common_start: bool = False

    def require(self, ranks: Mapping[str, int], modules: Mapping[str, Collection[str]]) -> None:
        """Raises ValueError where these clients (id -> rank, id -> adapted modules) cannot take part together."""
        if self.mixed_ranks:
            return
        if len(set(ranks.values())) > 1:
            raise ValueError(f"{self.name} averages clients of one rank, got {dict(ranks)}: use flora or zero-padding")
        if len({frozenset(names) for names in modules.values()}) > 1:
            counts = {client: len(names) for client, names in modules.items()}
            raise ValueError(
                f"{self.name} averages clients with the same modules, got different ones ({counts}): "
                "use flora or zero-padding"
            )
