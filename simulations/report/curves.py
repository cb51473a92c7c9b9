"""The lines of a report's figures: name -> points, read from its document. The page's own reading is series.js."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = dict[str, Any]
Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name -> its points."""


def lines(run: Mapping[str, Any], kind: str) -> list[Line]:
    """The lines of metrics.jsonl of a kind: round or evaluation."""
    return [line for line in run["lines"] if line["kind"] == kind]


ROUNDING = 1e-6
"""Relative errors up to this are float32 rounding."""


def noise_lines(run: Mapping[str, Any]) -> list[Line]:
    """The rounds that were measured (aggregation.noise)."""
    return [line for line in lines(run, "round") if line.get("noise")]


def _points(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """The pairs that are numbers: a run may have null or NaN where a figure is undefined."""
    return [(x, y) for x, y in pairs if isinstance(y, int | float) and isinstance(x, int | float)]


def metric(runs: Sequence[Any], kind: str, name: str) -> Series:
    """A metric by round: of one run by client, and of the server's own examples; of several their means."""
    if len(runs) > 1:
        return {
            run["label"]: _points([(line["round"], _mean(line, name)) for line in lines(run, kind)]) for run in runs
        }
    found = lines(runs[0], kind)
    server = _points([(line["round"], line.get("server", {}).get(name)) for line in found])
    clients = sorted({client for line in found for client in line["clients"]})
    each = {c: _points([(line["round"], line["clients"].get(c, {}).get(name)) for line in found]) for c in clients}
    return each | ({"server": server} if server else {})


def _mean(line: Line, name: str) -> float | None:
    """The mean over the clients by their examples, as the line has it or computed."""
    if name in line.get("mean", {}):
        mean: float | None = line["mean"][name]
        return mean
    weight = "examples" if line["kind"] == "evaluation" else "num_examples"
    pairs = _points([(client.get(weight), client.get(name)) for client in line["clients"].values()])
    total = sum(w for w, _ in pairs)
    return sum(w * value for w, value in pairs) / total if total else None


def by_bytes(runs: Sequence[Any], name: str) -> Series:
    """Run -> an outcome against the MB that all its clients had sent and received by then."""
    found = {}
    for run in runs:
        sent = {0: 0.0}
        for line in lines(run, "round"):
            moved = sum(c.get("bytes_up", 0) + c.get("bytes_down", 0) for c in line["clients"].values())
            sent[line["round"]] = sent[max(sent)] + moved / 1e6
        found[run["label"]] = _points([(sent.get(e["round"]), _mean(e, name)) for e in lines(run, "evaluation")])
    return found


def beyond_rounding(figures: Mapping[str, Any]) -> bool:
    """Whether a method's error is more than float32 rounding: what is exact needs no plot."""
    return bool(figures.get("modules")) and (figures.get("relative_error") or 0.0) > ROUNDING


def noise(run: Mapping[str, Any]) -> Series:
    """Method -> its relative error by round, of the methods that err in any round."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    measured = noise_lines(run)
    for line in measured:
        for method, figures in line["noise"].get("methods", {}).items():
            if any(beyond_rounding(other["noise"].get("methods", {}).get(method, {})) for other in measured):
                found.setdefault(method, []).append((line["round"], figures.get("relative_error")))
    return {method: _points(pairs) for method, pairs in found.items()}


def inits(run: Mapping[str, Any]) -> str:
    """How A was initialised: no noise figure goes without it."""
    return ", ".join(sorted({str(line["noise"].get("init")) for line in noise_lines(run)}))


def energy(runs: Sequence[Any]) -> Series:
    """The pooled energy of each run's last round."""
    last = [(run, measured[-1]) for run in runs if (measured := noise_lines(run))]
    return {
        f"{run['label']}, round {line['round']}": _points(
            sorted((int(rank), part) for rank, part in line["noise"].get("energy", {}).items())
        )
        for run, line in last
    }


def shares(run: Mapping[str, Any]) -> Series:
    """Client -> its signed share in the change by round."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for line in noise_lines(run):
        for client, part in line["noise"].get("share", {}).items():
            found.setdefault(client, []).append((line["round"], part))
    return {client: _points(found[client]) for client in sorted(found)}
