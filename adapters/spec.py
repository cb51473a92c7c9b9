"""What a client attaches: a LoRA of a rank, as PEFT understands it."""

import math
from dataclasses import dataclass

from peft import LoraConfig

TargetModules = str | tuple[str, ...]


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA in PEFT's terms. Raises ValueError for a rank below 1 or an alpha that is not positive.

    `target_modules` follows PEFT: "all-linear", a regular expression, or names that end a module's path.
    Modules in `exclude` are left out, whatever the targets say. `kind` is one of `KINDS`, `seed` that of its random
    bases. `alpha` is PEFT's lora_alpha; the scaling s is
    alpha / rank, or alpha / √rank with `rslora`. `sora_threshold` and `allora_eta` are options of those kinds.
    """

    rank: int
    alpha: float
    target_modules: TargetModules
    rslora: bool = False
    dropout: float = 0.0
    exclude: tuple[str, ...] = ()
    kind: str = "lora"
    seed: int = 0
    sora_threshold: float = 0.1
    allora_eta: float = 10.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    @property
    def scaling(self) -> float:
        """s, the factor of B @ A in the forward pass."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_peft(self) -> LoraConfig:
        """The same as a PEFT configuration. It names no task: PEFT would train parts of its own choice for some."""
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            bias="none",
            exclude_modules=list(self.exclude) or None,
        )


UNDERSTOOD = frozenset(
    [
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "task_type",
        "peft_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "runtime_config",
        "init_lora_weights",
        "bias",
    ]
)
"""Fields of LoraConfig that plain additive LoRA is made of, or that do not change ΔW."""


def refuse_unsupported(config: LoraConfig) -> None:
    """Raises ValueError, naming the option, where the adapter is more than B @ A added to unchanged base weights.

    DoRA scales the base, PiSSA, OLoRA and CorDA starts change it, biases, saved modules and token rows are no
    low-rank deltas: reading only their factors would be silently wrong. Whatever PEFT adds later is refused until
    it is understood.
    """
    plain = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in UNDERSTOOD and value != plain.get(name) and value:
            raise ValueError(f"only plain LoRA can be federated, got {name} = {value!r} in the adapter's configuration")
    if config.peft_type is not None and str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"only plain LoRA can be federated, got peft_type = {config.peft_type}")
    if config.bias != "none":
        raise ValueError(f"only plain LoRA can be federated, got bias = {config.bias!r}: use bias = 'none'")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"only LoRA that starts from the unchanged base can be federated, got init_lora_weights = "
            f"{config.init_lora_weights!r}: use True or 'gaussian', or convert the adapter to plain LoRA first"
        )
