"""LoRA factors in and out of a live model. The only place where the scaling enters and leaves B."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla.adapters.matrix import is_convolution, require_adaptable, unadaptable, weight_shape
from corolla.adapters.spec import AdapterSpec, refuse_unsupported
from corolla.aggregation import LowRankDelta, LowRankState, ranks

LOCAL, MERGED, PERSONAL = "local", "merged", "personal"
"""The names of the adapter that is federated, of the frozen one beside it, and of one that stays on its client."""

PREFIX = "base_model.model."
"""What PEFT puts before a module's own name."""


def _layers(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """Module name -> LoRA layer that holds the adapter `name`."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.r:
            if name not in module.lora_A:
                raise ValueError(
                    "only linear modules and convolutions can be federated, got "
                    f"{type(module.get_base_layer()).__name__} at {path.removeprefix(PREFIX)}: leave it out of "
                    "target_modules"
                )
            found[path.removeprefix(PREFIX)] = module
    require_adaptable((path, layer.get_base_layer()) for path, layer in found.items())
    return found


def _factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _matrices(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), views of the parameters: those of a convolution are kernels."""
    a, b = _factors(layer, name)
    return a.flatten(1), b.flatten(1)


def lora_factors(model: nn.Module, name: str = LOCAL) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module -> the live (A, B) of adapter `name`, (rank, in) and (out, rank), and its scaling s: ΔW = s B @ A."""
    return {module: (*_matrices(layer, name), layer.scaling[name]) for module, layer in _layers(model, name).items()}


def require_right(base: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError, naming it, for a convolution among the targets that PEFT would adapt, but not right."""
    odd = [(name, layer) for name, layer in base.named_modules() if unadaptable(layer)]
    require_adaptable((name, layer) for name, layer in odd if check_target_module_exists(config, name))


def _require_known(model: PeftModel, name: str) -> None:
    """Raises ValueError for an adapter that does not exist or is not plain LoRA."""
    if name not in model.peft_config:
        raise ValueError(f"adapter must be one of {sorted(model.peft_config)}, got {name!r}")
    refuse_unsupported(model.peft_config[name])


def read_adapter(model: PeftModel, name: str = LOCAL) -> dict[str, LowRankDelta]:
    """The adapter `name` as module -> LowRankDelta with s folded into B: ΔW = B @ A exactly as the forward pass has it.

    Float32 copies on the CPU; rank patterns, alpha patterns and rsLoRA are PEFT's own scaling of each layer. Works
    for linear layers, transformers' Conv1D, quantised linears, and convolutions, whose kernel (out, in, k…) is taken
    for the matrix (out, in · k…). Raises ValueError, naming it, for whatever is not plain additive LoRA.
    """
    _require_known(model, name)
    return {module: _read(layer, name) for module, layer in _layers(model, name).items()}


def _read(layer: LoraLayer, name: str) -> LowRankDelta:
    a, b = (factor.detach().to("cpu", torch.float32) for factor in _matrices(layer, name))
    return LowRankDelta(a.clone(), (b.double() * layer.scaling[name]).float())


@torch.no_grad()
def write_adapter(model: PeftModel, adapter: LowRankState, name: str = LOCAL) -> None:
    """Sets the factors of adapter `name` in place, s taken out of B, and reads them back.

    Exactly the modules and shapes that the model has must come: raises ValueError with the missing, the unknown and
    the misfits by name, before anything is written; and RuntimeError if what is read back differs.
    """
    _require_known(model, name)
    layers = _layers(model, name)
    _require_fit(layers, adapter, name)
    for module, layer in layers.items():
        a, b = _factors(layer, name)
        a.copy_(adapter[module].A.reshape(a.shape))
        b.copy_((adapter[module].B.double() / layer.scaling[name]).reshape(b.shape))
    _require_same(adapter, layers, name)


def _require_fit(layers: Mapping[str, LoraLayer], adapter: LowRankState, name: str) -> None:
    if missing := sorted(layers.keys() - adapter.keys()):
        raise ValueError(f"adapter {name!r} needs every module of the model, got none for {_some(missing)}")
    if unknown := sorted(adapter.keys() - layers.keys()):
        raise ValueError(f"adapter {name!r} must fit the model's modules, got unknown ones: {_some(unknown)}")
    for module, layer in layers.items():
        a, b = _matrices(layer, name)
        wanted, got = (tuple(a.shape), tuple(b.shape)), (tuple(adapter[module].A.shape), tuple(adapter[module].B.shape))
        if wanted != got:
            raise ValueError(f"{module} of adapter {name!r} needs A and B of shapes {wanted}, got {got}")


def _require_same(sent: LowRankState, layers: Mapping[str, LoraLayer], name: str) -> None:
    """Entry by entry, to the rounding of the layer's own precision."""
    for module, layer in layers.items():
        rounding = 4 * torch.finfo(_factors(layer, name)[0].dtype).eps
        loaded = _read(layer, name)
        for factor in "AB":
            wanted, got = getattr(sent[module], factor), getattr(loaded, factor)
            if not torch.allclose(got, wanted, rtol=rounding, atol=0.0):
                error = float((got - wanted).abs().max())
                raise RuntimeError(
                    f"{factor} of {module} was loaded with an error of {error:.2e}: "
                    "the model does not hold what was sent"
                )


def _some(names: Collection[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every module that can be adapted: linear ones and convolutions.

    The model may be on torch's meta device.
    """
    return {
        name: weight_shape(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or (is_convolution(module) and not unadaptable(module))
    }


def target_shapes(base: nn.Module, spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of what `spec` adapts in `base`, by PEFT's own rules. The base is left as it was.

    Raises ValueError where nothing matches (PEFT's message names the targets), or something is neither a linear module
    nor a convolution that PEFT adapts right.
    """
    with attached(base, spec) as model:
        return {module: (b.shape[0], a.shape[1]) for module, (a, b, _) in lora_factors(model).items()}


@contextmanager
def attached(
    base: nn.Module,
    spec: AdapterSpec | None,
    start: LowRankState | None = None,
    frozen: LowRankState | None = None,
    trains: Collection[str] = ("A", "B"),
) -> Iterator[PeftModel]:
    """`base` with the trainable adapter `local` at `start` and, beside it, the frozen `merged`; both act.

    Works in place and puts the base back as it was at the end, whatever happens in between; the base weights are
    never touched. `trains` says which factors of `local` take gradients. `spec` None attaches the frozen part
    alone. Raises what `write_adapter` raises, and ValueError for a convolution that PEFT cannot adapt right.
    """
    configs = _configs(spec, frozen)
    model: Any = None
    try:
        for config in configs.values():
            require_right(base, config)
        for name, config in configs.items():
            if model is None:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        if model is None:
            raise ValueError("attached needs a spec or a frozen adapter, got neither")
        if start is not None:
            write_adapter(model, start, LOCAL)
        if MERGED in configs:
            write_adapter(model, frozen or {}, MERGED)
        model.base_model.set_adapter(list(configs))
        _set_requires_grad(model, trains)
        yield model
    finally:
        if model is not None:
            model.unload()
        for attribute in ("peft_config", "_hf_peft_config_loaded"):  # PEFT leaves them and warns the next time
            base.__dict__.pop(attribute, None)


@contextmanager
def personal_beside(model: PeftModel, spec: AdapterSpec, start: LowRankState) -> Iterator[PeftModel]:
    """`model` of `attached` with one more trainable adapter, `personal` at `start`; it goes with the others.

    Read it by `read_adapter(model, PERSONAL)`. Raises what `write_adapter` raises.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter(PERSONAL, spec.to_peft())
    write_adapter(model, start, PERSONAL)
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, f".{PERSONAL}." in name))
    yield model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """`model` computing as if no LoRA were attached, and again as before at the end.

    PEFT's own `disable_adapter` turns gradients on for every active adapter when it ends, the frozen one too.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _configs(spec: AdapterSpec | None, frozen: LowRankState | None) -> dict[str, LoraConfig]:
    configs = {} if spec is None else {LOCAL: spec.to_peft()}
    return configs | ({MERGED: frozen_config(ranks(frozen))} if frozen else {})


def frozen_config(module_ranks: Mapping[str, int]) -> LoraConfig:
    """A PEFT configuration with scaling 1 for exactly these modules, each with its own rank."""
    pattern = {module.replace(".", r"\."): rank for module, rank in module_ranks.items()}
    widest = max(pattern.values())
    return LoraConfig(
        r=widest,
        lora_alpha=widest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(module_ranks),
        bias="none",
    )


def attach_empty(
    base: nn.Module, spec: AdapterSpec, frozen_rank: int = 0, personal: AdapterSpec | None = None
) -> PeftModel:
    """`base` with what a client attaches, as `attached` does it, but without values and for good.

    For models on the meta device. The frozen part has `frozen_rank`, or the narrow side of a module that is less.
    """
    require_right(base, spec.to_peft())
    model: Any = get_peft_model(base, spec.to_peft(), adapter_name=LOCAL)
    if frozen_rank:
        sides = {m: (a.shape[1], b.shape[0]) for m, (a, b, _) in lora_factors(model).items()}
        model.add_adapter(MERGED, frozen_config({m: min(frozen_rank, *side) for m, side in sides.items()}))
    if personal:
        model.add_adapter(PERSONAL, personal.to_peft())
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{LOCAL}." in name or f".{PERSONAL}." in name)
    return model  # type: ignore[no-any-return]


def _set_requires_grad(model: PeftModel, trains: Collection[str]) -> None:
    """Gradients for the chosen factors of `local` alone; PEFT turns them on for every active adapter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if LOCAL in model.peft_config:
        for layer in _layers(model, LOCAL).values():
            for factor, parameter in zip("AB", _factors(layer, LOCAL), strict=True):
                parameter.requires_grad_(factor in trains)
