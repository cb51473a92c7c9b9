"""Aggregation of low-rank adapters: pure functions on frozen values, on torch alone.

`flora`, `warm`, `fedit` and `zero-padding` are in `AGGREGATORS`; `stack` is FLoRA's sum by itself.
"""

from corolla.aggregation.averaging import average_by_position
from corolla.aggregation.exact import certify, exact_mean
from corolla.aggregation.flora import stack
from corolla.aggregation.lowrank import (
    Budget,
    adapter_norm,
    add,
    add_adapters,
    compress,
    compress_adapter,
    distance,
    norm,
    ranks,
    scale,
    scale_adapter,
    singular_values,
    without_empty,
    zeros,
)
from corolla.aggregation.method import Method
from corolla.aggregation.registry import AGGREGATORS, build_method
from corolla.aggregation.rounds import ClientShare, advance, cut, share, whole
from corolla.aggregation.start import FreshRows, fill, fill_adapter
from corolla.aggregation.state import (
    AdapterState,
    Certificate,
    ClientRule,
    ClientUpdate,
    GlobalModel,
    GlobalUpdate,
    LowRankDelta,
    Shapes,
)
from corolla.aggregation.weights import WEIGHTS, client_weights

__all__ = [
    "AGGREGATORS",
    "WEIGHTS",
    "AdapterState",
    "Budget",
    "Certificate",
    "ClientRule",
    "ClientShare",
    "ClientUpdate",
    "FreshRows",
    "GlobalModel",
    "GlobalUpdate",
    "LowRankDelta",
    "Method",
    "Shapes",
    "adapter_norm",
    "add",
    "add_adapters",
    "advance",
    "average_by_position",
    "build_method",
    "certify",
    "client_weights",
    "compress",
    "compress_adapter",
    "cut",
    "distance",
    "exact_mean",
    "fill",
    "fill_adapter",
    "norm",
    "ranks",
    "scale",
    "scale_adapter",
    "share",
    "singular_values",
    "stack",
    "whole",
    "without_empty",
    "zeros",
]
