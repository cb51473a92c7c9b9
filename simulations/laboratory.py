"""Adapters that somebody trained already: what merging them loses, by every method, and the merge itself."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from corolla.adapters import FolderFacts, read_peft_facts, read_peft_folder, write_peft_folder
from corolla.aggregation import (
    Budget,
    Certificate,
    ClientUpdate,
    GlobalModel,
    LowRankState,
    adapter_norm,
    advance,
    build_method,
    certify,
    compress_adapter,
    distance,
    exact_mean,
    low_rank,
    measure_noise,
    ranks,
    whole,
    without_empty,
)
from corolla.simulations.report.gather import label_paths

CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class Adapters:
    """Some adapters of one base, with their weights (sum 1), by the shortest names that tell their folders apart."""

    updates: tuple[ClientUpdate, ...]
    weights: dict[str, float]
    facts: FolderFacts


def read_adapters(folders: Sequence[Path], weights: Sequence[float] = (), any_base: bool = False) -> Adapters:
    """The adapters in these PEFT folders; `weights` in their order, equal if there are none.

    Raises ValueError for fewer than one folder, a folder twice, weights that are not one positive number each,
    adapters of different bases (by the name they were saved with; `any_base` lets that pass), modules whose shapes
    differ, and anything that is not plain additive LoRA.
    """
    if not folders:
        raise ValueError("at least one adapter folder is needed, got none")
    if weights and (len(weights) != len(folders) or not all(0 < weight < math.inf for weight in weights)):
        raise ValueError(f"weights must be one positive number for each of {len(folders)} adapters, got {[*weights]}")
    found = {label: read_peft_folder(path) for label, path in zip(label_paths(folders), folders, strict=True)}
    facts = [read_peft_facts(path) for path in folders]
    bases = sorted({fact.base_name for fact in facts})
    if len(bases) > 1 and not any_base:
        raise ValueError(
            f"adapters of one base are needed, got {', '.join(bases)}: if these are the same one, add --any-base"
        )
    if len({(fact.fan_in_fan_out, fact.task_type) for fact in facts}) > 1:
        found_types = sorted({f"{fact.task_type}, fan_in_fan_out = {fact.fan_in_fan_out}" for fact in facts})
        raise ValueError(f"adapters of one base and task are needed, got {'; '.join(found_types)}")
    _require_one_shape(found)
    given = dict(zip(found, weights or [1.0] * len(folders), strict=True))
    total = sum(given.values())
    shares = {label: weight / total for label, weight in sorted(given.items())}
    updates = tuple(ClientUpdate(label, 1, adapter) for label, adapter in found.items())
    kernels = {module: kernel for fact in facts for module, kernel in fact.kernels.items()}
    return Adapters(updates, shares, replace(facts[0], kernels=kernels))


def _require_one_shape(adapters: dict[str, LowRankState] | dict[str, Any]) -> None:
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for label, adapter in adapters.items():
        for module, delta in adapter.items():
            first, shape = shapes.setdefault(module, (label, delta.shape))
            if shape != delta.shape:
                raise ValueError(
                    f"{module} must have one shape, got {shape} in {first} and {delta.shape} in {label}: "
                    "the adapters are not of one base"
                )


def noise_of(adapters: Adapters) -> dict[str, Any]:
    """What every method would make of these adapters: `measure_noise` as if they were a first round's replies.

    Whether they began from one A is not known from their folders, so `init` is "unknown", and `method` is empty.
    """
    found = measure_noise(adapters.updates, adapters.weights, GlobalModel(), build_method("flora"), init="unknown")
    return found | {"method": ""}


@dataclass(frozen=True)
class Merge:
    """A merged adapter as it was written, and the proof: `relative_error` is ‖merged − exact‖_F / ‖exact‖_F."""

    rank: int
    relative_error: float
    certificate: Certificate


def merge_adapters(
    adapters: Adapters, out: Path, method: str = "flora", rank: int | None = None, energy: float | None = None
) -> Merge:
    """Writes what `method` makes of the adapters to `out`: a PEFT folder with alpha = r, and its certificate.

    `rank` cuts every module to that rank, `energy` keeps that part of its squared norm. What was written is read back
    and certified, all losses together. Raises FileExistsError for a folder that is not empty, ValueError for a method
    that asks something else of its clients or cannot serve these, or for an energy outside (0, 1].
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out must be a new folder, got {out} with files in it")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"--energy must be in (0, 1], got {energy}: 0.99 keeps 99 % of the squared norm")
    chosen = build_method(method)
    if chosen.foreign:
        raise ValueError(f"{method} cannot merge adapters of other clients, since {chosen.foreign}: use flora")
    chosen.require(
        {u.client_id: max(ranks(u.adapter).values()) for u in adapters.updates},
        {u.client_id: u.adapter for u in adapters.updates},
    )
    outcome = chosen.aggregate(adapters.updates, adapters.weights, GlobalModel())
    model, _ = advance(GlobalModel(), outcome)
    small, _ = compress_adapter(whole(model), Budget(rank, (1 - energy) ** 0.5 if energy is not None else 0.0))
    write_peft_folder(low_rank(without_empty(small)), out, adapters.facts)
    return _prove(adapters, out, outcome.certificate, cut=rank is not None or energy is not None)


def _prove(adapters: Adapters, out: Path, proof: Certificate, cut: bool) -> Merge:
    """The certificate of what is in the folder now, written beside it."""
    written = read_peft_folder(out)
    claim = proof.reason if proof.exact else ""
    reason = ("cut after aggregation" if cut else "") if proof.exact else proof.reason
    final = certify(written, adapters.updates, adapters.weights, {}, claim, reason)
    exact = exact_mean(adapters.updates, adapters.weights, {})
    size = adapter_norm(exact)
    merge = Merge(max(ranks(written).values()), distance(written, exact) / size if size else 0.0, final)
    (out / CERTIFICATE).write_text(json.dumps(asdict(merge) | {"weights": adapters.weights}, indent=2))
    return merge
