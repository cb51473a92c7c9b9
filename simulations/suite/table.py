"""A suite's outcomes as rows with mean and spread, as markdown, and as JSON."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from corolla.server.scores import LOSS, MEANINGS, score_in, title
from corolla.simulations.suite.cells import DONE, FAILED, REFUSED, Outcome, divergence
from corolla.simulations.suite.config import REFERENCES, Suite

KIB, MIB = 2.0**10, 2.0**20


@dataclass(frozen=True)
class Statistic:
    """Mean over n seeds and, from two seeds on, the standard deviation (of a sample: divided by n − 1)."""

    mean: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        """Of at least one value."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(math.fsum(values) / len(values), spread, len(values))


@dataclass(frozen=True)
class Row:
    """One method (or reference) in one setting: statistics by name, the divergence by round, reasons of what is
    missing by seed."""

    name: str
    setting: str
    numbers: Mapping[str, Statistic]
    divergence: Mapping[int, Statistic]
    refused: Mapping[int, str]
    failed: Mapping[int, str]

    @property
    def n(self) -> int:
        """The number of seeds that are done."""
        return next((statistic.n for statistic in self.numbers.values()), 0)


Column = tuple[str, str, float, str]
"""A column's title, its number, what to multiply that by, and its format."""

LOSS_COLUMN: Column = ("held-out loss", LOSS, 1.0, ".3f")

COLUMNS: Sequence[Column] = (
    ("up KiB", "bytes_up", 1 / KIB, ".0f"),
    ("down KiB", "bytes_down", 1 / KIB, ".0f"),
    ("total MiB", "bytes_total", 1 / MIB, ".2f"),
    ("certificate", "certificate", 1.0, ".1e"),
    ("divergence", "divergence", 1.0, ".3f"),
)

LEGEND = (
    "Mean ± standard deviation over n seeds (of a sample; none for one seed, or where all are equal). Held-out loss: "
    "nats per answer token{score} of the final model on the held-out examples of all clients "
    "together, the same for every row. Up and down: bytes of adapters, the mean of a client and round; total: of all "
    "clients and rounds; the base model and evaluations are not counted. Certificate: error of the last round's "
    "aggregation against the exact mean of its replies, relative to their size. Divergence: ‖W − W_exact‖ / "
    "‖W_exact‖ (Frobenius) of what the last round adds to the base, from the run of {reference}; a "
    "method that draws other rows of A than {reference} is as far from it as another seed of {reference} is, whatever "
    "its aggregation does.\n\n"
    "base: no training. local-only: every client by itself, one continuous training as long as its part of the run; "
    "the mean over clients. one-round: flora, one round with all the local steps. centralised: one client of the "
    "largest rank with all the data, one continuous training with as many optimizer steps of the same batch as all "
    "clients together."
)


@dataclass(frozen=True)
class SuiteResult:
    """All of a suite: its rows, setting by setting, and the outcomes they sum up."""

    suite: Suite
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    between_seeds: Mapping[str, Mapping[int, Statistic]]

    @classmethod
    def of(cls, suite: Suite, outcomes: Sequence[Outcome]) -> "SuiteResult":
        """The rows of these outcomes. Distances from the reference's runs are read from the checkpoints.

        `between_seeds` is the yardstick by setting: how far the reference's runs of two seeds, one after the other
        in the list, are from one another by round.
        """
        rows = [_row(suite, outcomes, setting, name) for setting in suite.settings for name in suite.rows]
        between = {setting: _between_seeds(suite, outcomes, setting) for setting in suite.settings}
        return cls(suite, tuple(rows), tuple(outcomes), between)

    @property
    def failed(self) -> list[Outcome]:
        """The runs that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == FAILED]

    def row(self, setting: str, name: str) -> Row:
        """One row. Raises KeyError for one that is not there."""
        found = {(row.setting, row.name): row for row in self.rows}
        return found[setting, name]

    def header(self) -> list[str]:
        """The titles of a setting's table."""
        return ["", "n", *(title for title, *_ in self.columns())]

    def score(self) -> str | None:
        """The name of the score of this suite's task, None where its examples have none."""
        return next((score for outcome in self.outcomes if (score := score_in(outcome.numbers))), None)

    def columns(self) -> list[Column]:
        """The columns that are numbers: the loss, the score if there is one, and what everything costs."""
        score = self.score()
        return [LOSS_COLUMN, *([(f"{title(score)} %", score, 100.0, ".1f")] if score else []), *COLUMNS]

    def lines(self, setting: str) -> list[list[str]]:
        """A setting's table as text, a line a row."""
        columns = self.columns()
        return [_line(row, columns) for row in self.rows if row.setting == setting]

    def notes(self) -> list[str]:
        """What failed, and what had less than its budget."""
        notes = [f"{o.row} in {o.setting}, seed {o.seed}, failed: {o.reason}" for o in self.failed]
        for o in self.outcomes:
            if o.numbers.get("lost"):
                notes.append(f"{o.row} in {o.setting}, seed {o.seed}, lost {o.numbers['lost']:.0f} replies of clients")
        return notes

    def to_markdown(self) -> str:
        """A table a setting, the divergence by round, what failed, and what the columns mean."""
        parts = [f"# {self.suite.title}", f"Seeds: {', '.join(map(str, self.suite.seeds))}."]
        for setting in self.suite.settings:
            parts += [f"## {setting}", _markdown(self.header(), self.lines(setting))]
            by_round = self._by_round(setting)
            if by_round:
                parts += ["Divergence by round:", by_round]
        if notes := self.notes():
            parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
        score = self.score()
        meaning = f"; {title(score)}: {MEANINGS.get(score, 'a score')}; both" if score else ""
        return "\n\n".join([*parts, LEGEND.format(reference=self.suite.reference, score=meaning)]) + "\n"

    def _by_round(self, setting: str) -> str:
        rows = [row for row in self.rows if row.setting == setting and row.divergence]
        rounds = sorted({round_number for row in rows for round_number in row.divergence})
        found = [(row.name, row.divergence) for row in rows]
        if between := self.between_seeds[setting]:
            found.append((f"{self.suite.reference}, next seed", between))
        lines = [[name, *(_text(values.get(r), 1.0, ".3f") for r in rounds)] for name, values in found]
        return _markdown(["", *map(str, rounds)], lines) if len(rounds) > 1 else ""

    def to_json(self) -> dict[str, Any]:
        """The suite, every row and every outcome, in JSON's types."""
        outcomes = [asdict(outcome) | {"folder": str(outcome.folder)} for outcome in self.outcomes]
        suite = self.suite.model_dump(mode="json", by_alias=True)
        between = {s: {r: asdict(v) for r, v in found.items()} for s, found in self.between_seeds.items()}
        rows = [asdict(row) for row in self.rows]
        return {"suite": suite, "rows": rows, "between_seeds": between, "outcomes": outcomes}


def _row(suite: Suite, outcomes: Sequence[Outcome], setting: str, name: str) -> Row:
    mine = [o for o in outcomes if (o.setting, o.row) == (setting, name)]
    done = [o for o in mine if o.status == DONE]
    exact = _exact(suite, outcomes, setting)
    distances = [divergence(o.folder, exact[o.seed].folder) for o in done if name not in REFERENCES and o.seed in exact]
    names = dict.fromkeys(key for o in done for key in o.numbers)
    numbers = {key: _over_seeds([o.numbers for o in done], key) for key in names}
    by_round = _by_round(distances)
    if by_round:
        numbers["divergence"] = by_round[max(by_round)]
    return Row(name, setting, numbers, by_round, _reasons(mine, REFUSED), _reasons(mine, FAILED))


def _exact(suite: Suite, outcomes: Sequence[Outcome], setting: str) -> dict[int, Outcome]:
    """The reference's runs of a setting by seed."""
    return {o.seed: o for o in outcomes if (o.setting, o.row, o.status) == (setting, suite.reference, DONE)}


def _between_seeds(suite: Suite, outcomes: Sequence[Outcome], setting: str) -> dict[int, Statistic]:
    runs = list(_exact(suite, outcomes, setting).values())
    return _by_round([divergence(one.folder, other.folder) for other, one in pairwise(runs)])


def _by_round(distances: Sequence[Mapping[int, float]]) -> dict[int, Statistic]:
    return {key: _over_seeds(distances, key) for key in sorted({key for found in distances for key in found})}


def _over_seeds(found: Sequence[Mapping[Any, float]], key: Any) -> Statistic:
    return Statistic.of([numbers[key] for numbers in found if key in numbers])


def _reasons(outcomes: Sequence[Outcome], status: str) -> dict[int, str]:
    return {outcome.seed: outcome.reason for outcome in outcomes if outcome.status == status}


def _line(row: Row, columns: Sequence[Column]) -> list[str]:
    if not row.n:
        status, reasons = (REFUSED, row.refused) if row.refused else (FAILED, row.failed)
        return [row.name, "0", f"{status}: {next(iter(reasons.values()), '')}", *[""] * (len(columns) - 1)]
    return [row.name, str(row.n), *(_text(row.numbers.get(key), factor, form) for _, key, factor, form in columns)]


def _text(statistic: Statistic | None, factor: float, form: str) -> str:
    if statistic is None:
        return "–"
    mean = format(factor * statistic.mean, form)
    return mean if not statistic.spread else f"{mean} ± {format(factor * statistic.spread, form)}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escape: Callable[[str], str] = lambda text: text.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(map(escape, row)) + " |" for row in rows)
