"""Robust aggregation: clients are judged by what they changed, and the judgement is nothing but weights.

So a stack stays a stack, and every exact method is exact for the weights that were chosen. Coordinate-wise medians and
trimmed means have no such form and are not here.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corolla.aggregation.exact import in_order
from corolla.aggregation.geometry import Geometry, measure_geometry
from corolla.aggregation.method import Method
from corolla.aggregation.state import ClientUpdate, GlobalModel

MEDIAN = "median"
"""A clip norm that is the (lower) median of the clients' own norms."""

NU, LEAST = 1e-6, 1e-150
"""Weiszfeld's smallest distance, of the median one, so that a client at the median does not get all the weight; and
where the median is 0, as most clients did the same, the smallest one whose inverse can be summed."""


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of K clients: their weights (K,), which sum to 1; the part (K,) of each change that counts,
    at most 1; and its scores (K,) by name."""

    weights: Tensor
    parts: Tensor
    scores: Mapping[str, Tensor]


Rule = Callable[[Geometry, Tensor], Verdict]
"""(geometry, p_k) -> verdict. Raises ValueError where it cannot judge these clients, or none of them is left."""


def clip(clip_norm: float | str = MEDIAN) -> Rule:
    """D_k counts as min(1, C / ‖D_k‖_F) D_k with C = `clip_norm` (arXiv:1911.07963), over all modules together."""
    if isinstance(clip_norm, str) and clip_norm != MEDIAN:
        raise ValueError(f"clip_norm must be a number above 0 or {MEDIAN!r}, got {clip_norm!r}")

    def rule(geometry: Geometry, weights: Tensor) -> Verdict:
        norms = geometry.norms
        limit = float(norms.median()) if isinstance(clip_norm, str) else clip_norm
        parts = torch.where(norms > limit, limit / norms.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        return Verdict(weights, parts, {"clip_norm": torch.full_like(norms, limit)})

    return rule


def cosine(cosine_threshold: float = 0.0) -> Rule:
    """Keeps the clients whose median cosine to the others is at least `cosine_threshold`.

    With fewer bad clients than half of an honest client's others, that median lies among its cosines to honest ones:
    no length and no number of examples moves it. Blind to length: follow it by clip.
    """

    def rule(geometry: Geometry, weights: Tensor) -> Verdict:
        found = median_cosines(geometry)
        return _only(found >= cosine_threshold, weights, {}, f"a median cosine of at least {cosine_threshold:g}")

    return rule


def krum(byzantine: int) -> Rule:
    """Keeps the one client with the smallest sum of squared distances to its n − f − 2 nearest others, f = `byzantine`
    (arXiv:1703.02757). Raises ValueError, at the round, for fewer than 2f + 3 clients."""
    return _krum(byzantine, lambda count: 1)


def multi_krum(byzantine: int) -> Rule:
    """Keeps the n − f clients of the smallest Krum scores, with their own weights among one another."""
    return _krum(byzantine, lambda count: count - byzantine)


def _krum(byzantine: int, size: Callable[[int], int]) -> Rule:
    def rule(geometry: Geometry, weights: Tensor) -> Verdict:
        require_majority(byzantine, len(geometry.clients))
        scores = krum_scores(geometry, byzantine)
        best = torch.argsort(scores, stable=True)[: size(len(scores))]
        kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, best, True)
        return _only(kept, weights, {"krum": scores}, "a weight among the selected")

    return rule


def krum_scores(geometry: Geometry, byzantine: int) -> Tensor:
    """Σ ‖D_k − D_j‖² over the n − f − 2 nearest others of each client, (K,)."""
    count = len(geometry.clients)
    others = geometry.squared.masked_select(~torch.eye(count, dtype=torch.bool)).view(count, count - 1)
    return others.sort(dim=1).values[:, : count - byzantine - 2].sum(dim=1)


def require_majority(byzantine: int, clients: int) -> None:
    """Raises ValueError for fewer than 2f + 3 clients."""
    if clients < 2 * byzantine + 3:
        raise ValueError(
            f"Krum against f = {byzantine} bad clients needs 2f + 3 = {2 * byzantine + 3} clients in a round, got "
            f"{clients}: lower aggregation.byzantine or have more clients take part"
        )


def geometric_median(weiszfeld_steps: int = 100) -> Rule:
    """Weights under which the mean is the geometric median arg min_z Σ p_k ‖z − D_k‖, by Weiszfeld's iteration
    (RFA, arXiv:1912.13445): w_k ∝ p_k / max(ν, ‖z − D_k‖), ν = NU of the median distance.

    Clients of less than half the weight in all cannot move z arbitrarily far.
    """
    if weiszfeld_steps < 1:
        raise ValueError(f"weiszfeld_steps must be at least 1, got {weiszfeld_steps}")

    def rule(geometry: Geometry, weights: Tensor) -> Verdict:
        found = weights
        for _ in range(weiszfeld_steps):
            distances = distances_to_mean(geometry, found)
            pulls = weights / distances.clamp(min=NU * float(distances.median()) or LEAST)
            before, found = found, pulls / pulls.sum()
            if float((found - before).abs().max()) < 1e-12:
                break
        return Verdict(found, torch.ones_like(found), {"distance": distances_to_mean(geometry, found)})

    return rule


def distances_to_mean(geometry: Geometry, weights: Tensor) -> Tensor:
    """‖D_k − Σ w_j D_j‖, (K,), for weights that sum to 1: Σ_j w_j d²_kj − ½ Σ_ij w_i w_j d²_ij."""
    to_each = geometry.squared @ weights
    return (to_each - 0.5 * (weights @ to_each)).clamp(min=0).sqrt()


def median_cosines(geometry: Geometry) -> Tensor:
    """The (lower) median of each client's cosines to the others, (K,); 1 for a client by itself."""
    count = len(geometry.clients)
    if count < 2:
        return torch.ones(count, dtype=torch.float64)
    others = geometry.cosines.masked_select(~torch.eye(count, dtype=torch.bool)).view(count, count - 1)
    return others.median(dim=1).values


def _only(kept: Tensor, weights: Tensor, scores: Mapping[str, Tensor], wanted: str) -> Verdict:
    total = float(weights[kept].sum())
    if total <= 0:
        raise ValueError(f"robust aggregation needs a client with {wanted}, got none of {len(weights)}")
    return Verdict(torch.where(kept, weights / total, 0.0), torch.ones_like(weights), scores)


ROBUST: Mapping[str, Callable[..., Rule]] = {
    "clip": clip,
    "cosine": cosine,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
}
"""The rules by name. "none" is none of them, and "cosine+clip" is one after the other."""


@dataclass(frozen=True)
class Chosen:
    """What a method is given: updates, and their weights by client id, which sum to 1 where there is a start.

    For the round's record, by client: `counted`, the weight of its change, and `scores`, what it was judged by.
    """

    updates: Sequence[ClientUpdate]
    weights: Mapping[str, float]
    counted: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]


Judge = Callable[[Sequence[ClientUpdate], Mapping[str, float], GlobalModel], Chosen]
"""(updates, client id -> p_k, model before the round) -> what the method is given."""


def trust(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> Chosen:
    """Everybody, as they are."""
    return Chosen(updates, weights, weights, {})


def parse_rules(names: str) -> list[str]:
    """The rules of "cosine+clip", in order; none for "none". Raises ValueError for others, and for a clip that is not
    the last: what comes after it would undo it."""
    found = [] if names == "none" else names.split("+")
    if odd := [name for name in found if name not in ROBUST]:
        raise ValueError(f"robust must be none, or of {', '.join(sorted(ROBUST))} joined by +, got {odd[0]!r}")
    if "clip" in found[:-1]:
        raise ValueError(f"clip must come last, got {names!r}: weights that are made equal again would undo it")
    return found


def build_judge(names: str, method: Method, **options: Any) -> Judge:
    """The judge of these rules, with their options.

    Raises ValueError for an unknown rule, an option that none of them has, one that is lacking, or a method that
    averages factors, which no judgement of ΔW protects.
    """
    found = parse_rules(names)
    known = {name: inspect.signature(ROBUST[name]).parameters for name in found}
    if odd := sorted(option for option in options if not any(option in has for has in known.values())):
        raise ValueError(f"{odd[0]} is no option of robust = {names!r}, got {options[odd[0]]!r}: leave it out")
    if not found:
        return trust
    if not method.by_product:
        raise ValueError(
            f"robust = {names!r} judges the products B A, got {method.name}, which averages factors: a client could "
            "send (c B, A / c), the same product, and move them anywhere: use flora, warm, ffa or another that does not"
        )
    for name, has in known.items():
        if lacking := [o for o, p in has.items() if p.default is p.empty and o not in options]:
            raise ValueError(f"robust = {name!r} needs {lacking[0]}, got none: set aggregation.{lacking[0]}")
    rules = [ROBUST[name](**{o: v for o, v in options.items() if o in known[name]}) for name in found]
    return lambda updates, weights, model: judge(rules, updates, weights, model)


def judge(
    rules: Sequence[Rule], updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel
) -> Chosen:
    """The clients as the rules, one after the other, leave them.

    A weight of 0 is as if that client had not taken part. A client of which only a part c counts is two: one that
    moved, with c of the weight, and one that did not, with the rest: together they changed it by c D_k, in any method
    that goes by products.
    """
    ordered = in_order(updates)
    geometry = measure_geometry(ordered, model.start)
    before = torch.tensor([weights[u.client_id] for u in ordered], dtype=torch.float64)
    share, parts = before, torch.ones_like(before)
    scores: dict[str, Tensor] = {"norm": geometry.norms, "cosine": median_cosines(geometry)}
    for rule in rules:
        left = torch.nonzero(share > 0)[:, 0]
        verdict = rule(geometry.of(left.tolist()), share[left])
        share = torch.zeros_like(share).index_copy(0, left, verdict.weights)
        parts = torch.ones_like(share).index_copy(0, left, verdict.parts)
        nan = torch.full_like(share, math.nan)
        scores |= {name: nan.index_copy(0, left, values) for name, values in verdict.scores.items()}
    scores["weight_before"] = before
    counted = dict(zip(geometry.clients, (share * parts).tolist(), strict=True))
    named = {
        client: {name: float(values[k]) for name, values in scores.items() if not values[k].isnan()}
        for k, client in enumerate(geometry.clients)
    }
    return Chosen(*_split(ordered, share.tolist(), parts.tolist(), model), counted, named)


def _split(
    updates: Sequence[ClientUpdate], shares: Sequence[float], parts: Sequence[float], model: GlobalModel
) -> tuple[list[ClientUpdate], dict[str, float]]:
    """Those who moved, and beside each that counts in part one that stood still: at S_k, so only where there is one."""
    chosen: list[ClientUpdate] = []
    weights: dict[str, float] = {}
    for update, share, part in zip(updates, shares, parts, strict=True):
        if share * part > 0:
            chosen.append(update)
            weights[update.client_id] = share * part
        if share * (1 - part) > 0 and model.start:
            held = {m: model.start[m].first(d.rank) for m, d in update.adapter.items() if m in model.start}
            chosen.append(replace(update, client_id=f"{update.client_id}/still", adapter=held))
            weights[f"{update.client_id}/still"] = share * (1 - part)
    return chosen, weights
