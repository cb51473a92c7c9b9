"""Aggregation of adapters: pure functions on frozen values, on torch alone.

The methods are in `AGGREGATORS`, one file each in `methods`; `stack` is FLoRA's sum by itself.
"""

from corolla.aggregation.algebra import (
    adapter_norm,
    add,
    add_adapters,
    after,
    compress,
    compress_adapter,
    distance,
    norm,
    ranks,
    scale,
    scale_adapter,
    singular_values,
    without_empty,
)
from corolla.aggregation.delta import (
    AdapterState,
    Delta,
    DenseDelta,
    LowRankDelta,
    LowRankState,
    RowScaleDelta,
    delta_of,
    is_low_rank,
    low_rank,
)
from corolla.aggregation.exact import certify, exact_mean, in_order
from corolla.aggregation.first_gradient import (
    SIDES,
    GradientSketch,
    leading_pairs,
    random_matrices,
    sum_sketches,
    widths,
)
from corolla.aggregation.gaussian import secure_gaussian
from corolla.aggregation.lowrank import Budget, zeros
from corolla.aggregation.method import Method
from corolla.aggregation.methods.flora import stack
from corolla.aggregation.noise import Against, NoiseOf, against, entropy_gap, measure_noise, pool
from corolla.aggregation.offset import with_offset
from corolla.aggregation.optimizers import OPTIMIZERS, with_optimizer
from corolla.aggregation.private import Mechanism, private_update, require_linear
from corolla.aggregation.registry import AGGREGATORS, build_method
from corolla.aggregation.robust import ROBUST, Chosen, Judge, build_judge, require_majority, trust
from corolla.aggregation.rounds import ClientShare, advance, cut, moved, share, whole
from corolla.aggregation.slots import Slots
from corolla.aggregation.spectrum import Spectrum, pooled_energy, spectrum
from corolla.aggregation.squeeze import Squeeze, halved, parse_halved
from corolla.aggregation.start import FreshRows, Principal, fill, fill_adapter, no_principal
from corolla.aggregation.state import (
    Certificate,
    ClientRule,
    ClientUpdate,
    GlobalModel,
    GlobalUpdate,
    Shapes,
)
from corolla.aggregation.weights import WEIGHTS, client_weights
from corolla.aggregation.whole_modules import aggregate_round, only, without

__all__ = [
    "AGGREGATORS",
    "OPTIMIZERS",
    "ROBUST",
    "SIDES",
    "WEIGHTS",
    "AdapterState",
    "Against",
    "Budget",
    "Certificate",
    "Chosen",
    "ClientRule",
    "ClientShare",
    "ClientUpdate",
    "Delta",
    "DenseDelta",
    "FreshRows",
    "GlobalModel",
    "GlobalUpdate",
    "GradientSketch",
    "Judge",
    "LowRankDelta",
    "LowRankState",
    "Mechanism",
    "Method",
    "NoiseOf",
    "Principal",
    "RowScaleDelta",
    "Shapes",
    "Slots",
    "Spectrum",
    "Squeeze",
    "adapter_norm",
    "add",
    "add_adapters",
    "advance",
    "after",
    "against",
    "aggregate_round",
    "build_judge",
    "build_method",
    "certify",
    "client_weights",
    "compress",
    "compress_adapter",
    "cut",
    "delta_of",
    "distance",
    "entropy_gap",
    "exact_mean",
    "fill",
    "fill_adapter",
    "halved",
    "in_order",
    "is_low_rank",
    "leading_pairs",
    "low_rank",
    "measure_noise",
    "moved",
    "no_principal",
    "norm",
    "only",
    "parse_halved",
    "pool",
    "pooled_energy",
    "private_update",
    "random_matrices",
    "ranks",
    "require_linear",
    "require_majority",
    "scale",
    "scale_adapter",
    "secure_gaussian",
    "share",
    "singular_values",
    "spectrum",
    "stack",
    "sum_sketches",
    "trust",
    "whole",
    "widths",
    "with_offset",
    "with_optimizer",
    "without",
    "without_empty",
    "zeros",
]
