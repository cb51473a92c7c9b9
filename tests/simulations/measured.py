"""Rounds with noise figures, as aggregation.noise writes them, made up from a seed."""

import json
import random
from pathlib import Path
from typing import Any

METHODS = ("zero-padding", "flexlora", "top-8", "top-4")
REFUSAL = "fedit averages clients of one rank, got ranks 2 to 6"


def noise(clients: list[str], layers: int, seed: int, method: str = "flora") -> dict[str, Any]:
    """The noise of one round: two module types in every layer, one method that does not apply."""
    draw = random.Random(seed)
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in ("q_proj", "v_proj")]
    parts = [draw.uniform(-0.1, 1) for _ in clients]
    return {
        "init": "shared",
        "method": method,
        "norm": draw.uniform(1, 20),
        "share": {client: part / sum(parts) for client, part in zip(clients, parts, strict=True)},
        "energy": energy(draw),
        "modules": {
            module: {
                "norm": draw.uniform(0.2, 2),
                "spectral_norm": draw.uniform(0.1, 0.2),
                "effective_rank": draw.uniform(2, 12),
                "entropy": draw.uniform(0.5, 2.5),
                "energy": energy(draw),
            }
            for module in modules
        },
        "entropy": {"exact": 2.5, "clients": 1.25, "gap": 1.25, "suggested_rank": 13},
        "methods": {"fedit": {"not_applicable": REFUSAL}}
        | {name: _method(draw, clients, modules, i) for i, name in enumerate(METHODS)},
        "seconds": draw.uniform(0.1, 0.5),
    }


def energy(draw: random.Random) -> dict[str, float]:
    """Rank -> cumulative energy, rising to one."""
    rate = draw.uniform(0.1, 0.4)
    return {str(rank): 1 - (1 - rate) ** rank for rank in (1, 2, 4, 8, 16, 32)} | {"64": 1.0}


def _method(draw: random.Random, clients: list[str], modules: list[str], i: int) -> dict[str, Any]:
    base = 0.6 / (i + 1)
    by_module = {module: base * draw.uniform(0.5, 1.5) for module in modules}
    return {
        "relative_error": base * draw.uniform(0.8, 1.2),
        "cosine": 1 - base / 3,
        "gain": 1 - base / 2,
        "spectral_error": base * 0.7,
        "client_error": base * 1.1,
        "bytes_down": {client: draw.randrange(10**5, 10**6) for client in clients},
        "modules": by_module | {modules[-1]: None},
    }


def add_noise(run: Path, layers: int = 2, seed: int = 0) -> None:
    """Gives every successful round of a finished run its noise, where the run did not measure it."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "round" and line["successful"] and not line.get("noise"):
            sound = [client for client, found in line["clients"].items() if "weight" in found]
            line["noise"] = noise(sound, layers, 100 * seed + line["round"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
