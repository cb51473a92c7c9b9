"""Everything a report shows, as one JSON document: the numbers of the runs' folders as they stand there."""

import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corolla.server.config import Config
from corolla.server.folder import CONFIG, RUN, RunFolder
from corolla.server.scores import MEANINGS, score_of, title
from corolla.simulations.simulate import COMPARISON

RUNS, NOISE = "runs", "noise"
"""The two kinds of document: whole runs, and the noise of one set of replies."""


def gather(runs: Sequence[Path]) -> dict[str, Any]:
    """The document of a report on `runs`.

    `lines` of a run are those of metrics.jsonl, unchanged but for numbers that JSON has no word for ("NaN",
    "Infinity"); `config` is config.toml flattened, with the settings it does not name as null. Raises
    FileNotFoundError for a folder without a run, ValueError for no run or the same run twice.
    """
    if not runs:
        raise ValueError("a report needs at least one run's folder, got none")
    folders = [RunFolder.open(Path(run)) for run in runs]
    labels = label_paths([folder.path for folder in folders])
    found = [_run(label, folder) for label, folder in zip(labels, folders, strict=True)]
    return _document(RUNS, "Corolla: " + ", ".join(labels), found)


def gather_noise(noise: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The document of one `noise` object (as a round's line has it) without a run around it."""
    line = {"kind": "round", "round": 1, "clients": {c: {} for c in noise.get("share") or {}}, "noise": noise}
    return _document(NOISE, title, [{"label": title, "lines": [_plain(line)]}])


def label_paths(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of `paths` that tell them apart. Raises ValueError where two are the same folder."""
    whole = [path.resolve() for path in paths]
    for path, count in Counter(whole).items():
        if count > 1:
            raise ValueError(f"the runs of a report must be different folders, got {path} {count} times")
    size = 1
    while len({path.parts[-size:] for path in whole}) < len(whole):
        size += 1
    return ["/".join(path.parts[-size:]) for path in whole]


def _run(label: str, folder: RunFolder) -> dict[str, Any]:
    config = _config(folder.path / CONFIG)
    facts = _read_json(folder.path / RUN)
    lines = folder.lines()
    score = score_of(lines)
    written = datetime.fromtimestamp((folder.path / CONFIG).stat().st_mtime, UTC)
    return {
        "label": label,
        "method": config["aggregation.method"],
        "model": config["model.name"],
        "score": score,
        "score_title": title(score).capitalize() if score else None,
        "score_meaning": MEANINGS.get(score) if score else None,
        "started": (facts or {}).get("started") or written.isoformat(timespec="seconds"),
        "facts": facts,
        "config": config,
        "comparison": _read_json(folder.path / COMPARISON),
        "lines": [_plain(line) for line in lines],
    }


def _config(path: Path) -> dict[str, Any]:
    """`section.name` -> value. A run of another version is read as it is, so nothing is validated here."""
    tables = tomllib.loads(path.read_text())
    flat = {f"{section}.{name}": value for section, values in tables.items() for name, value in values.items()}
    return {key: flat.get(key) for key in [*Config().flat(), *flat]}


def _read_json(path: Path) -> Any:
    return _plain(json.loads(path.read_text())) if path.is_file() else None


def _plain(value: Any) -> Any:
    """The same value with numbers that are not finite as their names: JSON in a browser has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _document(kind: str, title: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    noises = [line["noise"] for run in runs for line in run["lines"] if line.get("noise")]
    return {
        "kind": kind,
        "title": title,
        "runs": runs,
        "clients": sorted({client for run in runs for line in run["lines"] for client in clients_of(line)}),
        "methods": list(dict.fromkeys(method for noise in noises for method in noise.get("methods") or {})),
        "modules": place_modules({module for noise in noises for module in _modules_of(noise)}),
        "meanings": _meanings() if kind == RUNS else {},
    }


def _modules_of(noise: Mapping[str, Any]) -> set[str]:
    methods = (noise.get("methods") or {}).values()
    return set(noise.get("modules") or {}).union(*(found.get("modules") or {} for found in methods))


def clients_of(line: Mapping[str, Any]) -> set[str]:
    """Every client that a line of metrics.jsonl names."""
    parts = ("clients", "quarantined", "refused", "failed")
    return {client for part in parts for client in line.get(part) or {}}


def place_modules(modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Module name -> its `layer` (the first number in the name, null without one) and its `type`.

    The type is what is left of the name, cut to its last words as far as types stay apart:
    model.layers.10.self_attn.q_proj is layer 10 of q_proj.
    """
    places = {}
    for module in sorted(modules):
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        rest = tuple(parts) if at is None else (*parts[:at], *parts[at + 1 :])
        places[module] = (None if at is None else int(parts[at]), rest)
    types = {rest for _, rest in places.values()}
    short = {rest: _shortest_end(rest, types) for rest in types}
    return {module: {"layer": layer, "type": short[rest]} for module, (layer, rest) in places.items()}


def _shortest_end(rest: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    for size in range(1, len(rest)):
        if not any(other[-size:] == rest[-size:] for other in others - {rest}):
            return ".".join(rest[-size:])
    return ".".join(rest)


def _meanings() -> dict[str, str]:
    """Setting -> what it does."""
    return {
        f"{section}.{name}": value.description or ""
        for section, field in Config.model_fields.items()
        for name, value in field.annotation.model_fields.items()  # type: ignore[union-attr]
    }
