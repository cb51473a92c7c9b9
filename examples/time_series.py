"""Federated LoRA without a language model: three sites forecast series of their own with one common network.

python examples/time_series.py runs it in this process. A site gives its model, its data and one function,
(model, data, round) -> metrics; the strategy, the adapters of different ranks and their exact sum are Corolla's.
"""

from functools import lru_cache

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from corolla.adapters import AdapterSpec
from corolla.client.loop import OwnLoop, own_loop
from corolla.server.strategy import FederatedLoRA

WINDOW, PERIODS = 24, (7, 12, 31)


def series(period: int, seed: int, length: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of a noisy wave, (examples, WINDOW), and what comes next, (examples, 1)."""
    time = torch.arange(length) * 2 * torch.pi / period
    wave = torch.sin(time) + 0.5 * torch.sin(2 * time) + 0.05 * torch.randn(length, generator=_seeded(seed))
    return wave.unfold(0, WINDOW, 1)[:-1], wave[WINDOW:, None]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def base_model() -> nn.Module:
    """The network that every site has: trained here on waves of another period, so that there is something to adapt."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WINDOW, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    descend(model, series(20, seed=0), steps=200, rate=3e-3)
    return model.requires_grad_(False)


def descend(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], steps: int, rate: float) -> list[float]:
    """The losses of so many steps on whatever takes gradients in `model`."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], round: int) -> dict[str, float]:
    """What a site does in a round."""
    losses = descend(model, data, steps=40, rate=1e-2 / round)
    return {"loss_before": losses[0], "train_loss": sum(losses) / len(losses)}


def evaluate(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Mean squared error; the examples come from the site's own series."""
    with torch.no_grad():
        return {"held_out_loss": nn.functional.mse_loss(model(data[0]), data[1]).item()}


@lru_cache
def site(number: int) -> OwnLoop:
    """Site number 0, 1 or 2, of rank 2, 4 or 8."""
    data = series(PERIODS[number], seed=number + 1)
    spec = AdapterSpec(2 ** (number + 1), alpha=8.0, target_modules="all-linear")
    return OwnLoop(f"site-{number}", base_model(), data, spec, len(data[0]), train, evaluate)


client, server = own_loop(lambda context: site(int(context.node_config["partition-id"]))), ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Six rounds of warm stacking; prints every site's error before, and after."""
    FederatedLoRA(
        "warm",
        clients=3,
        on_evaluation=lambda round_number, sites, failed: print(
            f"after round {round_number}:", *(f"{name} {found['held_out_loss']:.4f}" for name, found in sites.items())
        ),
    ).run(grid, rounds=6)


if __name__ == "__main__":
    from corolla.simulations.grid import InProcessGrid

    main(InProcessGrid(client, [{"partition-id": k} for k in range(3)], {}), None)  # type: ignore[arg-type]
