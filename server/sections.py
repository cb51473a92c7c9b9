"""The sections of the configuration that are the server's own."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, field_validator, model_validator

from corolla.aggregation import (
    AGGREGATORS,
    OPTIMIZERS,
    ROBUST,
    WEIGHTS,
    Budget,
    Judge,
    Method,
    Squeeze,
    build_judge,
    build_method,
    parse_halved,
    with_optimizer,
)
from corolla.client.config import Section
from corolla.server.trackers import TRACKERS, parse_names


class AggregationConfig(Section):
    """How the server combines what clients reply."""

    method: str = Field("flora", description=f"one of {', '.join(sorted(AGGREGATORS))}")
    weights: str = Field("examples", description=f"p_k by one of {', '.join(sorted(WEIGHTS))}")
    max_rank: int | str | None = Field(
        None,
        description="largest rank of the server's merged part; '64..8': halved in stages over the rounds "
        "(LoRA-Squeeze); unset: lossless",
    )
    download_error: float = Field(1e-3, ge=0, lt=1, description="relative error that the cut of a download may have")
    download_rank: int | None = Field(None, ge=1, description="largest rank of the merged part in a download")
    noise: bool = Field(False, description="each round, what every method would make of the same replies")
    energy: float | None = Field(None, gt=0, le=1, description="florist: part of the energy that is kept (0.99)")
    keep: float | None = Field(None, gt=0, le=1, description="hetlora: part of a rank that pruning leaves (0.99)")
    penalty: float | None = Field(None, ge=0, description="hetlora: on last components (1e-3); lora-fair: ridge (0.01)")
    robust: str = Field("none", description=f"none, or of {', '.join(sorted(ROBUST))} joined by +: cosine+clip")
    byzantine: int | None = Field(None, ge=0, description="krum, multi-krum: clients of a round that may be bad")
    clip_norm: PositiveFloat | Literal["median"] | None = Field(
        None, description="clip: largest norm of a client's change (median: the clients' own)"
    )
    cosine_threshold: float | None = Field(
        None, ge=-1, le=1, description="cosine: smallest median cosine of a client's change to the others' (0)"
    )
    weiszfeld_steps: int | None = Field(None, ge=1, description="geometric-median: most steps to it (100)")
    server_optimizer: str = Field("none", description=f"none, or one of {', '.join(sorted(OPTIMIZERS))}")
    server_learning_rate: float | None = Field(None, gt=0, description="the server optimizer's step (1; fedadam 0.01)")
    server_momentum: float | None = Field(None, ge=0, lt=1, description="its first moment's decay (0.9)")
    server_beta2: float | None = Field(None, ge=0, lt=1, description="its second moment's decay (0.99)")
    server_tau: float | None = Field(None, gt=0, description="added to the root of its second moment (1e-3)")
    server_max_rank: int | None = Field(None, ge=1, description="largest rank of its momentum; unset: lossless")

    @field_validator("max_rank")
    @classmethod
    def _ranks_fall(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, str):
            parse_halved(value)
        elif value is not None and value < 1:
            raise ValueError("must be at least 1")
        return value

    def budget(self, rounds: int) -> Budget | Squeeze:
        """What `max_rank` limits the merged part to, in a run of so many rounds."""
        if isinstance(self.max_rank, str):
            return Squeeze(parse_halved(self.max_rank), rounds)
        return Budget(self.max_rank)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return _one_of(value, AGGREGATORS)

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        return _one_of(value, WEIGHTS)

    @field_validator("server_optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return _one_of(value, {"none": None, **OPTIMIZERS})

    def build(self) -> Method:
        """The method with its options and its server optimizer. Raises ValueError for what does not go together."""
        options = {name: value for name in ("energy", "keep", "penalty") if (value := getattr(self, name)) is not None}
        steps = {
            name.removeprefix("server_"): value
            for name, value in self
            if name.startswith("server_") and name != "server_optimizer" and value is not None
        }
        return with_optimizer(build_method(self.method, **options), self.server_optimizer, **steps)

    def judge(self) -> Judge:
        """Who chooses what the method is given. Raises ValueError for what does not go together."""
        names = ("byzantine", "clip_norm", "cosine_threshold", "weiszfeld_steps")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        return build_judge(self.robust, self.build(), **options)


class PrivacyConfig(Section):
    """Differential privacy of the global model, client by client; off without a noise multiplier."""

    noise_multiplier: float | None = Field(
        None, ge=0.3, description="deviation of the noise over clip_norm; unset: off (one round at 0.3 spends ε = 19)"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of a client's change in a round")
    delta: float = Field(1e-5, gt=0, lt=1, description="δ of (ε, δ); below one over the number of clients")
    epsilon: float | None = Field(None, gt=0, description="most that all rounds together may spend; unset: any")

    @model_validator(mode="after")
    def _noise_and_clip(self) -> Self:
        if self.noise_multiplier is None and (self.clip_norm or self.epsilon):
            raise ValueError(
                "privacy.clip_norm and privacy.epsilon need privacy.noise_multiplier, got none: without noise there is "
                "no privacy; to clip alone, set aggregation.robust = 'clip'"
            )
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise ValueError("privacy.noise_multiplier needs privacy.clip_norm, got none: noise is measured against it")
        return self


class SecureConfig(Section):
    """Secure sums: the server learns Σ p_k ΔW_k and no client's own (docs/secure.md)."""

    sums: bool = Field(False, description="masks on every upload; with flora, florist and warm, three clients at least")
    sketch: int | None = Field(
        None,
        ge=1,
        description="columns of the sketch, to which the upload is proportional; unset: exact, Σ of the clients' ranks",
    )
    threshold: float = Field(2 / 3, gt=0.5, le=1, description="part of the clients that can open a sum, and must")
    bits: Literal[32, 64] = Field(64, description="of every number on the way; 32: half the upload, a clip that fits")
    clip: float = Field(2.0**24, gt=0, description="largest number a client sends: weight times entry of its sketch")
    deadline: float = Field(300.0, gt=0, description="seconds that an exchange without training may take")

    @field_validator("bits", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class RunConfig(Section):
    """The run as a whole."""

    rounds: int = Field(2, ge=1, description="rounds of the whole run")
    fraction: float = Field(1.0, gt=0, le=1, description="part of the clients that takes part in a round")
    clients_per_round: int | None = Field(None, ge=1, description="their number, instead of a fraction")
    seed: int = Field(0, description="every random draw depends on it")
    out: str = Field("runs/latest", description="the run's folder")
    resume: bool = Field(False, description="a deployed run goes on with the run in run.out if one is there")
    evaluate: Literal["ends", "each", "never"] = Field(
        "ends", description="before round one and after the last, or each"
    )
    min_replies: int = Field(1, ge=1, description="fewer accepted replies fail the round, not the run")
    deadline: float = Field(3600.0, gt=0, description="seconds that a round may take")
    largest_message: float = Field(
        1.4, gt=0, description="GiB of one client's download or reply; beyond it a client is left out, with the reason"
    )
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints kept, besides the best")
    alone: bool = Field(False, description="in a simulation, train every client alone as well, and compare")
    keep_replies: bool = Field(False, description="keep every accepted reply beside the checkpoints")
    backend: Literal["inprocess", "ray"] = Field("inprocess", description="engine of `corolla simulate`")
    ray_cpus: int = Field(1, ge=1, description="CPUs of one client on Ray")
    ray_gpus: float = Field(0.0, ge=0, description="part of a GPU of one client on Ray")
    threads: int = Field(0, ge=0, description="CPU threads of torch in server and clients; 0: every core")
    trackers: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (), description=f"who gets every line's numbers: one or a list of {', '.join(TRACKERS)}"
    )

    def participants(self, clients: int) -> int:
        """How many of so many clients take part in a round."""
        return self.clients_per_round or math.ceil(self.fraction * clients)

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(name, TRACKERS) for name in dict.fromkeys(value))


def _one_of(value: str, registry: Mapping[str, Any]) -> str:
    if value not in registry:
        raise ValueError(f"must be one of {', '.join(sorted(registry))}")
    return value
