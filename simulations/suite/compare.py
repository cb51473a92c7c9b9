"""Runs what a suite has not done yet, and returns all of it.

    from corolla.simulations.suite import compare_suite
    print(compare_suite("suite.toml", out="runs/compare").to_markdown())

What is done is kept: the same call after a kill goes on where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from corolla.server.folder import RunFolder
from corolla.simulations.simulate import Watch
from corolla.simulations.suite.cells import Outcome, held_out, run_cell
from corolla.simulations.suite.config import Suite
from corolla.simulations.suite.table import SuiteResult
from corolla.simulations.suite.tiny_base import TINY, Recipe, tiny_base

SUITES = Path(__file__).parent
"""The suites that come with Corolla."""

SILENT = Watch()

OnCell = Callable[[Outcome, int, int], None]
"""Called after each cell with its outcome, its number from 1, and how many there are."""


def load_suite(suite: Suite | str | Path | Mapping[str, Any] | None) -> Suite:
    """A Suite from itself, a TOML file, nested tables, or None for the shipped tiny suite. Raises ConfigError."""
    if isinstance(suite, Suite):
        return suite
    if isinstance(suite, Mapping):
        return Suite.build(suite)
    return Suite.load(SUITES / "tiny.toml" if suite is None else Path(suite))


def compare_suite(
    suite: Suite | str | Path | Mapping[str, Any] | None = None,
    *,
    out: str | Path = "runs/compare",
    recipe: Recipe = TINY,
    watch: Watch = SILENT,
    on_cell: OnCell = lambda outcome, number, total: None,
) -> SuiteResult:
    """Runs what is not done yet of a suite into `out`, and returns all of it; `out` gets table.md and table.json.

    Each cell has the folder out/setting/row/seed-N. A method that refuses a setting and a run that fails are
    outcomes with a reason; both are tried again by the next call. `recipe` is that of base = "tiny". Raises
    ConfigError for a suite that cannot be used or a cell that was run with other settings, FileNotFoundError for a
    model or data that are not there, ValueError for data without held-out examples.
    """
    chosen, out = load_suite(suite), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = str(tiny_base(recipe, lambda step: watch.on_step("pre-training"))) if chosen.base else None
    for setting in chosen.settings:
        held_out(chosen.run_config(setting, chosen.rows[0], chosen.seeds[0], out, model))
    cells = list(_cells(chosen))
    outcomes = []
    for number, (seed, setting, row) in enumerate(cells, 1):
        folder = out / setting / row / f"seed-{seed}"
        make = partial(chosen.run_config, setting, row, seed, folder, model)
        outcomes.append(run_cell(row, setting, seed, folder, make, watch))
        on_cell(outcomes[-1], number, len(cells))
    result = SuiteResult.of(chosen, outcomes)
    home = RunFolder(out)
    home.write_json("table.json", result.to_json())
    home.write_text("table.md", result.to_markdown())
    return result


def _cells(suite: Suite) -> Iterator[tuple[int, str, str]]:
    """(seed, setting, row), the first seed of everything before the second of anything."""
    for seed in suite.seeds:
        for setting in suite.settings:
            for row in suite.rows:
                yield seed, setting, row
