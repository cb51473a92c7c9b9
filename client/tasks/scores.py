"""Scores between 0 and 1 over examples, and over groups of them."""

from collections.abc import Sequence


def by_group(name: str, hits: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """`name` and `examples` over all, and `name/<group>` and `examples/<group>` for every group that has a name."""
    metrics = {name: sum(hits) / len(hits), "examples": float(len(hits))}
    for group in sorted(set(filter(None, groups))):
        mine = [hit for hit, other in zip(hits, groups, strict=True) if other == group]
        metrics |= {f"{name}/{group}": sum(mine) / len(mine), f"examples/{group}": float(len(mine))}
    return metrics
