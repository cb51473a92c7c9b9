"""Differential privacy of a run: who takes part, what a round releases, and how much of ε is spent."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from corolla.aggregation import (
    Chosen,
    ClientUpdate,
    FreshRows,
    GlobalModel,
    Mechanism,
    Shapes,
    fill,
    private_update,
)


@dataclass(frozen=True)
class Privacy:
    """Central, client-level (ε, δ)-differential privacy of the global models of a run, add-or-remove-one.

    Every round each client takes part with `probability` q, independently and in secret; its change of the whole model
    is clipped to `clip_norm` C, and the sum gets noise of deviation `noise_multiplier` · C in every direction before it
    is divided by q times `clients`. Clients count alike, whatever number of examples they declare. The server that
    does this is trusted: it sees every reply as it is.
    """

    noise_multiplier: float
    clip_norm: float
    clients: int
    probability: float = 1.0
    delta: float = 1e-5

    def draw(self, clients: Iterable[str], seed: int, round_number: int) -> list[str]:
        """Each of the clients with the probability, by the system's random source, sorted; it may be nobody.

        `seed` and `round_number` do not matter: who knew the draw would know more than the accountant allows.
        """
        dice = secrets.SystemRandom()
        return [name for name in sorted(clients) if dice.random() < self.probability]

    def release(
        self, updates: Sequence[ClientUpdate], model: GlobalModel, trains: str, fresh: FreshRows, whole: Shapes
    ) -> Chosen:
        """The round's noised mean as the one update that the method gets. `whole` are modules of whole weights.

        `fresh` drew what clients filled the start up with; all have it in common.
        """
        start = {module: fill(delta, delta.rank, module, fresh) for module, delta in model.start.items()}
        mechanism = Mechanism(self.clip_norm, self.noise_multiplier, self.probability * self.clients)
        update = private_update(updates, start, whole, mechanism, trains)
        share = 1 / mechanism.expected
        return Chosen([update], {update.client_id: 1.0}, {u.client_id: share for u in updates}, {})

    def epsilon(self, rounds: int) -> float:
        """ε after that many rounds, empty and failed ones counted. Raises ImportError without dp-accounting."""
        return spent(self.noise_multiplier, self.probability, rounds, self.delta)

    def facts(self, rounds: int) -> dict[str, float]:
        """What a round's record says."""
        return {
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "probability": self.probability,
        }


@lru_cache(maxsize=1024)
def spent(noise_multiplier: float, probability: float, rounds: int, delta: float) -> float:
    """ε of `rounds` Poisson-sampled Gaussian mechanisms at δ, from above, by privacy loss distributions.

    Google's dp-accounting, the library that Flower's own extra for privacy uses. Raises ImportError without it.
    """
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld
    except ImportError as error:
        raise ImportError(
            "differential privacy needs the accountant dp-accounting, got none: pip install 'corolla[dp]'"
        ) from error
    if not rounds:
        return 0.0
    accountant = pld.PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(probability, GaussianDpEvent(noise_multiplier)), rounds)
    return float(accountant.get_epsilon(delta))
