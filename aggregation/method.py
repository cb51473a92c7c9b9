"""What a method is: a value with three parts, and what it asks of a federation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from corolla.aggregation.start import Principal
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate, Shapes

Aggregate = Callable[[Sequence[ClientUpdate], Mapping[str, float], GlobalModel], GlobalUpdate]
"""(updates, client id -> p_k, model) -> one round's outcome: a pure function."""


@dataclass(frozen=True)
class Method:
    """One way to aggregate.

    `initial(shapes, max_rank, seed, principal)` is the model before round 1; `constrain(round)` says what clients may
    train; `aggregate(updates, weights, model)` is one round's outcome. Where `mixed_ranks` is false, all clients must
    have one rank and one set of modules; with a `common_start` the server hands out A from round one, so clients
    cannot draw their own. `foreign` says why the method cannot be judged on replies that other methods' clients made
    (empty: it changes the server alone); `linear` are the factors in which the global model is linear and whose
    coordinates last over rounds. Where `lasting` is true, a component keeps its position and its meaning from round to
    round, so that what a client's optimizer remembers of it does too. `merges` says whether rounds add to the merged
    part, which clients then download. Where `by_product` is true, replies count through their products B_k A_k alone,
    so that who judges those judges all: a method that averages factors can be moved by (c B, A / c), whose ΔW is
    like any other. Where `of_the_sum` is
    true, the outcome is a function of Σ p_k ΔW_k alone, so that a secure sum is enough.
    """

    name: str
    initial: Callable[[Shapes, int, int, Principal], GlobalModel]
    constrain: Callable[[int], ClientRule]
    aggregate: Aggregate
    mixed_ranks: bool = True
    common_start: bool = False
    foreign: str = ""
    linear: frozenset[str] = frozenset()
    lasting: bool = False
    merges: bool = False
    by_product: bool = False
    of_the_sum: bool = False

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

    def require_of_the_sum(self) -> None:
        """Raises ValueError for a method that needs more than Σ p_k ΔW_k."""
        if not self.of_the_sum:
            raise ValueError(
                f"a secure sum gives Σ p_k ΔW_k alone, got method {self.name!r}, which needs every client's factors: "
                "use flora, florist or warm"
            )

    def admit(self, rank: int, modules: Collection[str], model: GlobalModel) -> None:
        """Raises ValueError where a client of `rank` cannot join a federation that has `model` already.

        With a common start it must find all its components and modules there: the server hands out A, and a component
        that others do not know would be lost.
        """
        if not self.common_start:
            return
        widths = {module: delta.rank for module, delta in model.start.items()}
        if unknown := sorted(set(modules) - widths.keys()):
            raise ValueError(
                f"{self.name} has a start common to all, without {unknown[0]}: join with its modules alone"
            )
        widest = min(widths[module] for module in modules)
        if rank > widest or (not self.mixed_ranks and (rank != widest or set(modules) != set(widths))):
            wanted = f"rank {widest} or less" if self.mixed_ranks else f"rank {widest} and all its modules"
            raise ValueError(f"{self.name} has a start common to all, got rank {rank}: join with {wanted}")


def require_one_rank(name: str, updates: Sequence[ClientUpdate]) -> None:
    """Raises ValueError naming the first client whose modules or ranks differ from the others'."""
    first = updates[0]
    expected = {module: delta.rank for module, delta in first.adapter.items()}
    for update in updates[1:]:
        got = {module: delta.rank for module, delta in update.adapter.items()}
        if got != expected:
            differing = sorted(m for m in expected.keys() | got.keys() if expected.get(m) != got.get(m))[0]
            raise ValueError(
                f"{name} averages clients of one rank, got rank {expected.get(differing, 'none')} from "
                f"{first.client_id} and {got.get(differing, 'none')} from {update.client_id} for {differing}; "
                "use flora or zero-padding for mixed ranks or modules"
            )
