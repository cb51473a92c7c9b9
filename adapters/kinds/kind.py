"""What a kind of adapter is: coordinates in which ΔW is linear, and the PEFT layer in which they are trained."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft import PeftConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from corolla.adapters.carry import beside
from corolla.adapters.lora import LOCAL, PREFIX, require_right
from corolla.adapters.matrix import as_matrix
from corolla.adapters.spec import AdapterSpec
from corolla.aggregation import AdapterState, Delta, FreshRows, LowRankDelta, add, low_rank, only, ranks, scale, without


class Kind(ABC):
    """A kind of adapter beyond LoRA. One file each, and a line in `KINDS`.

    `coordinates` says what travels, `rule` how the server combines it. `trains` are the names of the tensors that
    travel: A and B (low-rank in its coordinates), W (a mean), or d, A and B (rows scaled). Where `continues` is true,
    the trained part begins at the global model's coordinates and replies what it added; else the global model acts
    beside it, and it begins at no change. `inexact` says why the rule does not give Σ p_k ΔW_k, where it does not;
    `no_factors` why its change is not sent as A and B, so that clients of other kinds cannot be beside it.
    Where `shipped`, an adapter holds `<module>:left` and `<module>:right` as well, the bases that the server has made.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    coordinates: ClassVar[str]
    rule: ClassVar[str]
    trains: ClassVar[frozenset[str]]
    continues: ClassVar[bool] = False
    inexact: ClassVar[str] = ""
    no_factors: ClassVar[str] = ""
    shipped: ClassVar[bool] = False
    layer: ClassVar[type]

    @abstractmethod
    def config(self, spec: AdapterSpec) -> PeftConfig:
        """PEFT's configuration."""

    @abstractmethod
    def shape(self, layer: Any) -> tuple[int, int]:
        """The shape of a module's coordinates."""

    @abstractmethod
    def read(self, layer: Any) -> Delta:
        """A module's coordinates as they are now."""

    @abstractmethod
    def unfold(self, layer: Any, delta: Delta) -> Delta:
        """The change of the weight itself, (out, in), that coordinates stand for: linear in them."""

    def load(self, layer: Any, delta: Delta) -> None:
        """Sets a module's coordinates, where the kind `continues`."""
        raise NotImplementedError(f"{self.name} begins at no change")

    def average(self, layer: Any, deltas: Sequence[Delta], weights: Sequence[float]) -> Delta | None:
        """The coordinates that a mean of PEFT's own parameters would have: tensor by tensor, in float64.

        None where they do not say.
        """
        parts = [delta.double().tensors() for delta in deltas]
        means = {n: sum(w * part[n] for w, part in zip(weights, parts, strict=True)) for n in parts[0]}
        return type(deltas[0])(**means)

    def prepare(self, layers: Mapping[str, Any], spec: AdapterSpec) -> None:  # noqa: B027  (most need nothing)
        """Makes layers ready after PEFT has made them. Raises ValueError for one that the kind cannot have."""

    def begin(self, layer: Any, module: str, fresh: FreshRows) -> None:  # noqa: B027  (most begin at constants)
        """Draws what PEFT would draw from the process' own generator."""

    def place(self, layers: Mapping[str, Any], bases: AdapterState) -> None:
        """Puts `bases` in place, where they are `shipped`. Raises ValueError where they do not fit."""
        raise NotImplementedError(f"{self.name} makes its bases itself")

    def basis(self, layer: Any) -> list[Tensor]:
        """What all clients must share beside the base's weights."""
        return []

    def components(self, rank: int) -> int:
        """How many components a client of this rank sends, where it sends A and B."""
        return rank


@contextmanager
def attach(
    base: nn.Module, kind: Kind, spec: AdapterSpec, bases: AdapterState = MappingProxyType({})
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The PEFT model of this kind on `base`, at no change, and its layers by module. The base is put back at the end.

    `bases` are those that came with an adapter (`split`); without them a kind that needs some has its shapes alone.

    Raises ValueError where PEFT cannot adapt a target, or the kind cannot.
    """
    model: Any = None
    try:
        config = kind.config(spec)
        require_right(base, config)
        model = get_peft_model(base, config, adapter_name=LOCAL)
        layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, kind.layer)}
        if both := sorted(layers.keys() & set(spec.exclude)):
            raise ValueError(f"{kind.name} must leave {both[0]} out, which is trained whole: name other target_modules")
        kind.prepare(layers, spec)
        if bases:
            kind.place(layers, bases)
        yield model, layers
    finally:
        if model is not None:
            model.unload()
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            base.__dict__.pop(attribute, None)


BASES = (":left", ":right")
"""What the names of shipped bases end with."""


def split(kind: Kind, adapter: AdapterState) -> tuple[AdapterState, AdapterState]:
    """The coordinates in an adapter of this kind, and the bases that came with them.

    Raises ValueError where they must come and did not.
    """
    bases = {name: delta for name, delta in adapter.items() if kind.shipped and name.endswith(BASES)}
    if kind.shipped and not bases:
        raise ValueError(f"{kind.name} needs bases with its adapter, got none: the server makes them before round one")
    return without(adapter, bases), bases


@contextmanager
def train_kind(
    base: nn.Module, kind: Kind, spec: AdapterSpec, frozen: AdapterState, fresh: FreshRows
) -> Iterator[tuple[Any, Callable[[], dict[str, Delta]]]]:
    """The model with `frozen` (coordinates) in it, ready to be trained, and what reads the change since then.

    Raises ValueError for a frozen part that does not fit the layers.
    """
    frozen, bases = split(kind, frozen)
    with attach(base, kind, spec, bases) as (model, layers), ExitStack() as stack:
        _require_fit(kind, layers, frozen)
        for module, layer in layers.items():
            kind.begin(layer, module, fresh)
        if kind.continues:
            for module, delta in frozen.items():
                kind.load(layers[module], delta)
        else:
            stack.enter_context(beside({layers[m]: kind.unfold(layers[m], d) for m, d in frozen.items()}))
        before = {module: kind.read(layer) for module, layer in layers.items()} if kind.continues else {}

        def read() -> dict[str, Delta]:
            found = {module: kind.read(layer) for module, layer in layers.items()}
            return {m: _difference(delta, before[m]) if m in before else delta for m, delta in found.items()}

        yield model, read


@contextmanager
def train_unfolded(
    base: nn.Module, kind: Kind, spec: AdapterSpec, frozen: AdapterState, fresh: FreshRows, rank: int
) -> Iterator[tuple[Any, Callable[[], dict[str, Delta]]]]:
    """As `train_kind`, but `frozen` and what is read are changes of the weights themselves: the latter A and B.

    Training begins at no change, and every module has `rank` components, zeros where the kind has fewer.
    """
    with attach(base, kind, spec) as (model, layers):
        for module, layer in layers.items():
            kind.begin(layer, module, fresh)

        def read() -> dict[str, Delta]:
            found = {module: kind.unfold(layer, kind.read(layer)) for module, layer in layers.items()}
            return {module: _padded(delta.single(), rank) for module, delta in low_rank(found).items()}

        with beside({base.get_submodule(module): delta for module, delta in frozen.items()}):
            yield model, read


def _padded(delta: LowRankDelta, rank: int) -> LowRankDelta:
    lacking = rank - delta.rank
    return LowRankDelta(nn.functional.pad(delta.A, (0, 0, 0, lacking)), nn.functional.pad(delta.B, (0, lacking)))


def unfolded_shapes(base: nn.Module, kind: Kind, spec: AdapterSpec) -> tuple[dict[str, tuple[int, int]], int]:
    """Module -> (out, in), and how many components a client of this kind sends of each as A and B.

    Raises ValueError for a kind that has none.
    """
    require_factors(kind)
    with attach(base, kind, spec) as (_, layers):
        found = low_rank({module: kind.unfold(layer, kind.read(layer)) for module, layer in layers.items()})
        return {module: delta.shape for module, delta in found.items()}, max(ranks(found).values())


def require_factors(kind: Kind) -> None:
    """Raises ValueError for a kind whose change is not sent as A and B."""
    if kind.no_factors:
        raise ValueError(
            f"clients of different kinds send A and B, got {kind.name!r}: {kind.no_factors}; use it as adapter.kind "
            "for all"
        )


def _difference(now: Delta, before: Delta) -> Delta:
    return add([now.double(), scale(before.double(), -1.0)]).single()


def _require_fit(kind: Kind, layers: Mapping[str, Any], frozen: AdapterState) -> None:
    for module, delta in frozen.items():
        if module not in layers:
            raise ValueError(
                f"{kind.name} needs its modules in the base, got coordinates of {module}: not adapted here"
            )
        if delta.shape != (wanted := kind.shape(layers[module])):
            raise ValueError(f"{module} must have coordinates of shape {wanted}, got {delta.shape}")


def kind_shapes(base: nn.Module, kind: Kind, spec: AdapterSpec) -> tuple[dict[str, tuple[int, int]], str]:
    """Module -> the shape of its coordinates, and the hash of the basis (empty where the kind needs none)."""
    with attach(base, kind, spec) as (_, layers):
        digest = hashlib.sha256()
        tensors = [(m, t) for m, layer in sorted(layers.items()) for t in kind.basis(layer)]
        for module, tensor in tensors:
            digest.update(f"{module}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return {m: kind.shape(layer) for m, layer in layers.items()}, digest.hexdigest() if tensors else ""


def unfold_kind(base: nn.Module, kind: Kind, spec: AdapterSpec, adapter: AdapterState) -> dict[str, Delta]:
    """What an adapter in coordinates changes of the base's weights; modules that are no layers (heads) as they are."""
    adapter, bases = split(kind, adapter)
    with attach(base, kind, spec, bases) as (_, layers):
        inside = only(adapter, layers)
        _require_fit(kind, layers, inside)
        return {**without(adapter, layers), **{m: kind.unfold(layers[m], delta) for m, delta in inside.items()}}


def on_cpu(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32).clone()


def base_weight(layer: Any) -> Tensor:
    """The base's weight of a PEFT layer, (out, in), as a float32 copy on the CPU."""
    base = layer.get_base_layer()
    return as_matrix(base, on_cpu(dequantize_module_weight(base)))


def targets_of(spec: AdapterSpec) -> Any:
    """The field that every PEFT configuration has; what is excluded is checked after."""
    return {
        "target_modules": spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    }
