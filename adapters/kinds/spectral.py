"""ΔW = L M R: a small trained core M between two frozen bases, L (out, q) and R (q, in), that all clients share."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from corolla.adapters.kinds.kind import Kind, base_weight, on_cpu
from corolla.adapters.lora import LOCAL
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import Delta, DenseDelta, LowRankDelta

FAINT = 1e-6
"""A component below this part of the largest one is rounding noise: every machine would find another."""

_found: "WeakKeyDictionary[nn.Module, dict[str, tuple[int, Tensor, Tensor]]]" = WeakKeyDictionary()
"""Module of a base -> kind -> (rank, L, R), on the CPU: they go when the base goes."""


class SpectralLayer(nn.Module, LoraLayer):
    """A module with s L M R x beside it, as PEFT wants it. Without bases until `place`: then at M = 0."""

    adapter_layer_names = ("lora_core",)
    other_param_names = ("r", "scaling", "lora_dropout")
    left: Tensor
    right: Tensor
    r: dict[str, int]
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    merged_adapters: list[str]
    base_layer: Any
    get_base_layer: Any
    disable_adapters: Any
    merged: Any
    active_adapters: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = 1.0
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_core = nn.ParameterDict()

    def place(self, left: Tensor, right: Tensor, core: tuple[int, ...], scaling: float = 1.0) -> None:
        """Sets L (out, q), R (q, in) and s, and a zero M: of shape (q,), its diagonal, or (q, q)."""
        device = self.get_base_layer().weight.device
        self.register_buffer("left", left.to(device), persistent=False)
        self.register_buffer("right", right.to(device), persistent=False)
        self.scaling[LOCAL] = scaling
        self.lora_core[LOCAL] = nn.Parameter(torch.zeros(core, device=device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + s L M R x, the latter in float32 or in what autocast says."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged or LOCAL not in self.active_adapters:
            return result
        inner = linear(self.lora_dropout[LOCAL](x.to(self.right.dtype)), self.right)
        core = self.lora_core[LOCAL]
        inner = inner * core if core.ndim == 1 else linear(inner, core)
        return result + (linear(inner, self.left) * self.scaling[LOCAL]).to(result.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s L M R in the weight's own layout: (in, out) for a Conv1D."""
        core = self.lora_core[adapter]
        inner = torch.diag(core) if core.ndim == 1 else core
        change: Tensor = self.scaling[adapter] * (self.left @ inner @ self.right)
        return change.T if isinstance(self.get_base_layer(), Conv1D) else change

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the change to the weight. Raises ValueError for a quantised weight, or a sum that is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            weight = self.get_base_layer().weight
            if not weight.is_floating_point():
                raise ValueError(f"merging needs a weight in floating point, got {weight.dtype}: quantise none")
            changed = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not changed.isfinite().all():
                raise ValueError(f"the merged weight must be finite, got NaN or infinity from adapter {name!r}")
            weight.data = changed
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes off again what `merge` added."""
        while self.merged_adapters:
            weight = self.get_base_layer().weight
            weight.data = weight - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)


class Core(Kind):
    """A kind that trains s M alone, by layers of this file; it goes on from where the global model is."""

    trains = frozenset({"W"})
    continues = True
    layer = SpectralLayer

    def config(self, spec: AdapterSpec) -> PeftConfig:
        """LoRA's, with layers of this file for all modules: what is no linear one is refused once all are known."""
        config = replace(spec, kind="lora").to_peft()
        config._register_custom_module({nn.Module: SpectralLayer})
        return config

    def read(self, layer: Any) -> DenseDelta:
        """s M."""
        return DenseDelta(layer.scaling[LOCAL] * on_cpu(layer.lora_core[LOCAL]).reshape(self.shape(layer)))

    @torch.no_grad()
    def load(self, layer: Any, delta: Delta) -> None:
        """Sets M."""
        core = layer.lora_core[LOCAL]
        core.copy_(delta.dense().reshape(core.shape) / layer.scaling[LOCAL])


class Spectral(Core):
    """A kind whose bases come from the base's own weights; its coordinates are the diagonal of s M.

    The bases are found in float64 and rounded to the numbers of float16: what two LAPACKs find differs in the last
    bits, which the rounding takes away. None of 645,120 numbers from 15 modules of SmolLM2-135M differed between two of
    them; where one does, the hash of the bases tells.
    """

    rule = "linear: mean of c"
    scaled: ClassVar[bool] = False

    @abstractmethod
    def bases(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """L (out, rank) and R (rank, in) of a weight (out, in) in float64."""

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:
        """Puts the bases in place. Raises ValueError for a module that is not linear, or has no weight to read."""
        for module, layer in layers.items():
            left, right = self._bases_of(module, layer, spec.rank)
            layer.place(left, right, (len(right),), spec.scaling if self.scaled else 1.0)

    def _bases_of(self, module: str, layer: Any, rank: int) -> tuple[Tensor, Tensor]:
        inner = layer.get_base_layer()
        require_linear(self.name, module, inner)
        if inner.weight.is_meta:  # only the shapes are asked for
            q = min(rank, layer.out_features, layer.in_features)
            return torch.empty(layer.out_features, q, device="meta"), torch.empty(q, layer.in_features, device="meta")
        known = _found.setdefault(inner, {})
        if self.name not in known or known[self.name][0] != rank:
            require_floating(self.name, module, inner)
            weight = base_weight(layer).double()
            left, right = self.bases(weight, min(rank, *weight.shape))
            known[self.name] = (rank, portable(left), portable(right))
        return known[self.name][1:]

    def shape(self, layer: Any) -> tuple[int, int]:
        """(q, 1): the rank, or the narrow side of a module that has less."""
        return len(layer.right), 1

    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """L diag(c) and R."""
        c = delta.dense()
        left, right = (part.to(c.dtype) for part in self.basis(layer))
        return LowRankDelta(right, left * c.T)

    def basis(self, layer: Any) -> list[Tensor]:
        """L and R of this module."""
        return [on_cpu(layer.left), on_cpu(layer.right)]


def require_linear(name: str, module: str, layer: nn.Module) -> None:
    """Raises ValueError for a module that is not linear."""
    if not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(
            f"adapter.kind = {name!r} needs linear modules, got {type(layer).__name__} at {module}: leave it out of "
            "adapter.target_modules"
        )


def require_floating(name: str, module: str, layer: nn.Module) -> None:
    """Raises ValueError for a weight that is no floating-point one and cannot be dequantised."""
    if not (weight := dequantize_module_weight(layer)).is_floating_point():
        raise ValueError(
            f"adapter.kind = {name!r} makes its basis from weights in floating point, got {weight.dtype} at {module}, "
            "which cannot be dequantised: set model.quantization = 'none'"
        )


def portable(basis: Tensor) -> Tensor:
    """`basis` in float32, rounded to float16's numbers, without negative zeros."""
    return (basis.to(torch.float16).float() + 0.0).contiguous()


def without_faint(left: Tensor, right: Tensor, faint: Tensor) -> tuple[Tensor, Tensor]:
    """L and R with zeros for the components that are `faint` (q,): their coordinates change nothing, and stay 0."""
    return left.masked_fill(faint, 0.0), right.masked_fill(faint[:, None], 0.0)
