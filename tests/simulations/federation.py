"""The demo's configuration shrunk to a tiny model: a second or two per run."""

from pathlib import Path
from typing import Any

from corolla.server.config import Config


def tiny_config(model: Path, out: Path, /, **sections: dict[str, Any]) -> Config:
    """Three clients of ranks 6, 4 and 2 on generated tasks, two rounds of two steps; `sections` change it."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"tasks_train": 8, "tasks_held_out": 2, "max_new_tokens": 4},
        "adapter": {"target_modules": ("q_proj", "v_proj"), "scaling": 2.0},
        "clients": {"count": 3, "ranks": (6, 4, 2)},
        "train": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "run": {"rounds": 2, "out": str(out), "threads": 1},
    }
    for section, values in sections.items():
        tables[section] = tables.get(section, {}) | values
    return Config.build(tables)
