"""The report's plots as files for a paper: one figure a file, in vector form, drawn with matplotlib."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corolla.server.scores import title
from corolla.simulations.report.curves import (
    Series,
    beyond_rounding,
    by_bytes,
    energy,
    inits,
    lines,
    metric,
    noise,
    noise_lines,
    shares,
)
from corolla.simulations.report.gather import clients_of, gather

FORMATS = ("pdf", "svg")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#F0E442")
"""Okabe and Ito's; the dash and the marker change along."""
DASHES = ("-", "--", ":", "-.", (0, (4, 2)), (0, (12, 3)), (0, (1, 2)), (0, (9, 3, 2, 3)))
MARKERS = "os^DvPph"
WIDTH, HEIGHT = 5.2, 3.2
"""Inches."""
RANK = "rank r"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "corolla",  # the same file twice
    "text.parse_math": False,  # a client's name is no formula
}


def write_figures(runs: Sequence[Path], folder: Path, format: str = "svg") -> list[Path]:
    """Every plot that the runs have numbers for, as files of `format` in `folder`.

    One run is drawn by client, several by their means. Raises ValueError for another format, ImportError without
    matplotlib, and what `gather` raises.
    """
    if format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {format}")
    _require_matplotlib()
    document = gather(runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in plots(document).items():
        safe = re.sub(r"[^\w.-]", "_", name)
        written.append(folder / f"{safe}.{format}")
        _save(draw, written[-1])
    return written


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401  (an extra)
    except ImportError as error:
        raise ImportError("figures need matplotlib, got none installed: pip install 'corolla[report]'") from error


def _save(draw: Callable[[Any], None], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        stamp = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
        figure.savefig(path, metadata=stamp)


def plots(document: Mapping[str, Any]) -> dict[str, Callable[[Any], None]]:
    """File name without its ending -> what draws it on axes; without those that have no numbers."""
    runs = document["runs"]
    found: dict[str, Callable[[Any], None]] = {
        name: partial(_draw_lines, series={k: points for k, points in series.items() if points}, across=x, up=y)
        for name, (series, x, y) in _curves(runs).items()
        if any(series.values())
    }
    for run in runs:
        suffix = _suffix(runs, run)
        for method, values in _module_errors(run).items():
            name = f"{method}, A initialised {inits(run)}"
            found[f"heat-{method}{suffix}"] = partial(_draw_heat, values=values, places=document["modules"], name=name)
        if lines(run, "round"):
            found[f"participation{suffix}"] = partial(_draw_presence, rounds=lines(run, "round"))
    return found


def _curves(runs: Sequence[Any]) -> dict[str, tuple[Series, str, str]]:
    """File name -> its lines and what its two axes are."""
    found = {
        "held-out-loss": (metric(runs, "evaluation", "held_out_loss"), "round", "held-out loss, nats per token"),
        "train-loss": (metric(runs, "round", "train_loss"), "round", "training loss"),
        "loss-before": (metric(runs, "round", "loss_before"), "round", "probe loss before local steps"),
        "loss-after": (metric(runs, "round", "loss_after"), "round", "probe loss after local steps"),
        "held-out-loss-by-bytes": (by_bytes(runs, "held_out_loss"), "MB up and down", "held-out loss, nats per token"),
        "energy": (energy(runs), RANK, "energy within rank r"),
    }
    for score in dict.fromkeys(run["score"] for run in runs if run.get("score")):
        name = score.replace("_", "-")
        found[name] = (metric(runs, "evaluation", score), "round", title(score))
        found[f"{name}-by-bytes"] = (by_bytes(runs, score), "MB up and down", title(score))
    for run in runs:
        suffix = _suffix(runs, run)
        found[f"noise{suffix}"] = (noise(run), "round", f"relative error, A initialised {inits(run)}")
        found[f"share{suffix}"] = (shares(run), "round", "share in the change")
    return found


def _suffix(runs: Sequence[Any], run: Mapping[str, Any]) -> str:
    return f"-{run['label']}" if len(runs) > 1 else ""


def _module_errors(run: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Method -> module -> relative error in the run's last measured round, for those that err."""
    measured = noise_lines(run)
    methods = measured[-1]["noise"].get("methods", {}) if measured else {}
    return {method: found["modules"] for method, found in methods.items() if beyond_rounding(found)}


def _draw_lines(axes: Any, series: Series, across: str, up: str) -> None:
    last = {name: points[-1][1] for name, points in series.items()}
    for i, (name, points) in enumerate(series.items()):
        style = {"color": COLORS[i % 8], "linestyle": DASHES[i % 8], "marker": MARKERS[(i + i // 8) % 8]}
        axes.plot(*zip(*points, strict=True), label=name, markersize=4, linewidth=1.2, **style)
    if min(value for points in series.values() for _, value in points) >= 0:
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color="#888888", linewidth=0.8)
    if not up.endswith(("token", "loss", "steps")):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set(xlabel=across, ylabel=up)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if across == "round":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if across == RANK:
        ranks = sorted({rank for points in series.values() for rank, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks], minor=False)
    if len(series) > 1:
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda i: -last[names[i]])
        beside = {"handles": [handles[i] for i in order], "labels": [names[i] for i in order]}
        axes.legend(**beside, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=3.2)


def _draw_heat(axes: Any, values: Mapping[str, Any], places: Mapping[str, Any], name: str) -> None:
    """Rows are module types, columns layers; a module without the figure stays white."""
    types = list(dict.fromkeys(places[module]["type"] for module in values))
    layers = sorted({places[module]["layer"] for module in values}, key=lambda layer: (layer is None, layer))
    cells = [[math.nan] * len(layers) for _ in types]
    for module, value in values.items():
        place = places[module]
        if isinstance(value, int | float):
            cells[types.index(place["type"])][layers.index(place["layer"])] = value
    image = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0)
    axes.figure.set_figheight(1.1 + 0.3 * len(types))
    axes.set_yticks(range(len(types)), types)
    stride = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), stride), ["–" if layer is None else layer for layer in layers[::stride]])
    axes.set(xlabel="layer", title=name)
    axes.figure.colorbar(image, ax=axes, label="relative error", format=lambda value, _: f"{100 * value:g} %")


def _draw_presence(axes: Any, rounds: Sequence[Mapping[str, Any]]) -> None:
    """A square where a client took part, a cross where its reply was quarantined, a triangle where it was refused."""
    clients = sorted({client for line in rounds for client in clients_of(line)}, reverse=True)
    signs = {"took part": ("s", COLORS[0]), "quarantined": ("x", COLORS[1]), "refused": ("^", COLORS[3])}
    for what, (marker, color) in signs.items():
        found = [(line["round"], clients.index(c)) for line in rounds for c in clients if _part(line, c) == what]
        if found:
            axes.scatter(*zip(*found, strict=True), marker=marker, color=color, s=36, label=what)
    axes.set_yticks(range(len(clients)), clients)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="round", ylim=(-0.6, len(clients) - 0.4))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, fontsize=8)


def _part(line: Mapping[str, Any], client: str) -> str:
    for what in ("quarantined", "refused"):
        if client in (line.get(what) or {}):
            return what
    return "took part" if client in line["clients"] else "not sampled"
