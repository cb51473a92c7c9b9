"""What an evaluation found, for whoever shows it: its score by name, its means, and both in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from corolla.client.tasks import TASKS

LOSS = "held_out_loss"

OLD_SCORE = "exact_match"
"""The score of evaluations that were written before lines named theirs."""

EXAMPLES = "examples"

MEANINGS: Mapping[str, str] = {
    "exact_match": "greedy answers that are right",
    "accuracy": "examples whose most likely label is right",
    "preference_accuracy": "pairs whose better answer gained more on the base than the worse one",
}
"""What a score is the part of."""


def average(clients: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every number that clients report, by name: Σ examples·value / Σ examples over those that report it.

    A number of a group, `<name>/<group>`, is weighted by `examples/<group>`. The counts themselves have no mean.
    """
    names = dict.fromkeys(name for found in clients.values() for name in found)
    means = {}
    for name in (name for name in names if name.partition("/")[0] != EXAMPLES):
        group = name.partition("/")[2]
        pairs = [(_examples(found, group), found[name]) for found in clients.values() if name in found]
        if total := sum(weight for weight, _ in pairs):
            means[name] = sum(weight * value for weight, value in pairs) / total
    return means


def _examples(found: Mapping[str, float], group: str) -> float:
    """How many examples a client's number is of; 0 for a client that does not say."""
    return found.get(f"{EXAMPLES}/{group}", found.get(EXAMPLES, 0.0))


def score_of(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """The name of the score in a run's evaluations, None where none has one: plain text has a loss alone."""
    for line in lines:
        if line["kind"] != "evaluation":
            continue
        score: str = line.get("score", OLD_SCORE)
        places = [line.get("mean", {}), line.get("server", {}), *line.get("clients", {}).values()]
        if any(place.get(score) is not None for place in places):
            return score
    return None


def score_in(found: Mapping[str, Any]) -> str | None:
    """The task's score that is among these metrics, None where there is none."""
    return next((score for score in (task.score for task in TASKS.values()) if found.get(score) is not None), None)


def title(name: str) -> str:
    """The name in words: exact_match is "exact match"."""
    return name.replace("held_out", "held-out").replace("_", " ")


def describe(found: Mapping[str, Any], score: str | None) -> str:
    """Loss and score in words, as far as they were found."""
    return ", ".join(f"{title(name)} {_text(name, found[name])}" for name in _shown([found], score)) or "no numbers"


def describe_change(first: Mapping[str, Any], last: Mapping[str, Any], score: str | None) -> str:
    """The same before and after; "" where they have no number in common."""
    shown = _shown([first, last], score)
    return ", ".join(f"{title(name)} {_text(name, first[name])} → {_text(name, last[name])}" for name in shown)


def _shown(found: Iterable[Mapping[str, Any]], score: str | None) -> list[str]:
    found = list(found)
    return [name for name in (LOSS, score) if name and all(part.get(name) is not None for part in found)]


def _text(name: str, value: float) -> str:
    return f"{value:.3f}" if name == LOSS else f"{value:.1%}"
