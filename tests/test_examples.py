"""The examples run, and do what they say."""

import math
import runpy
from pathlib import Path

from corolla.simulations.grid import InProcessGrid

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_app_learns_in_somebody_elses_flower_app(capsys):
    app = runpy.run_path(str(EXAMPLES / "own_app.py"))
    before = {name: tensor.clone() for name, tensor in app["model"].state_dict().items()}
    app["main"](InProcessGrid(app["client"], [{"partition-id": k} for k in range(3)], {}), None)
    losses = [float(line) for line in capsys.readouterr().out.split() if line.replace(".", "").isdigit()]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2] > 0
    assert math.isfinite(losses[2])
    assert all((tensor == app["model"].state_dict()[name]).all() for name, tensor in before.items())


def test_sites_without_a_language_model_learn_each_others_series(capsys):
    app = runpy.run_path(str(EXAMPLES / "time_series.py"))
    before = {name: tensor.clone() for name, tensor in app["base_model"]().state_dict().items()}
    app["main"](InProcessGrid(app["client"], [{"partition-id": k} for k in range(3)], {}), None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("after round")]
    first, last = ([float(word) for word in line if word[0].isdigit() and "." in word] for line in lines)
    assert len(first) == len(last) == 3
    assert all(b < a / 3 for a, b in zip(first, last, strict=True))
    assert all((tensor == app["base_model"]().state_dict()[name]).all() for name, tensor in before.items())
