"""The whole configuration: one model, read from TOML, from `key=value`, and from Flower's run config."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from corolla.adapters import HOSTED, KINDS, AdapterSpec, Hosted, is_lora, read_peft_folder
from corolla.aggregation import (
    Method,
    require_linear,
    require_majority,
    with_offset,
)
from corolla.aggregation import ranks as rank_of
from corolla.client.config import (
    AUTO,
    NODE,
    AdapterConfig,
    ClientsConfig,
    ClientSettings,
    DataConfig,
    Expected,
    ModelConfig,
    Section,
    TrainConfig,
    head_of,
)
from corolla.client.secure.masks import LEAST
from corolla.server.privacy import Privacy
from corolla.server.sections import AggregationConfig, PrivacyConfig, RunConfig, SecureConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key, its value and the cure."""


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


class Config(Section):
    """A run's configuration. Every key is `section.name`; the defaults are the demo's."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    clients: ClientsConfig = ClientsConfig()
    train: TrainConfig = TrainConfig(local_steps=8)
    aggregation: AggregationConfig = AggregationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig = SecureConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self._hosted_fits()
        method = self.method()
        if self.data.server_held_out and self.run.evaluate == "never":
            raise ValueError(
                "data.server_held_out is evaluated when run.evaluate says so, got run.evaluate = 'never': use 'ends' "
                "or 'each'"
            )
        if self.adapter.init == "independent" and method.common_start:
            raise ValueError(
                f"adapter.init = 'independent' needs clients that draw their own A, got aggregation.method = "
                f"{self.aggregation.method!r} with a start common to all: use 'shared', or method 'flora'"
            )
        cuts = [name for name in ("max_rank", "download_rank", "server_max_rank") if getattr(self.aggregation, name)]
        if self.aggregation.method == "full" and (self.adapter.init_from or cuts):
            raise ValueError(
                "aggregation.method = 'full' moves whole weights, got adapter.init_from or "
                f"aggregation.{'/'.join(cuts) or 'max_rank'}, which are for adapters: leave them out"
            )
        if self.aggregation.method == "fr-lora" and (found := [name for name in cuts if name != "server_max_rank"]):
            raise ValueError(
                f"aggregation.method = 'fr-lora' keeps −S in its merged part, got aggregation.{found[0]}, which would "
                "cut it: leave it out"
            )
        if self.aggregation.method == "full" and self.model.quantization != "none":
            raise ValueError(
                f"aggregation.method = 'full' trains the weights themselves, got model.quantization = "
                f"{self.model.quantization!r}: use 'none', or another method"
            )
        if self.train.keep_optimizer and not method.lasting:
            raise ValueError(
                f"train.keep_optimizer needs components that last from round to round, got aggregation.method = "
                f"{self.aggregation.method!r}, which makes new ones: leave it out, or use a method like 'fedit'"
            )
        if self.aggregation.method == "full" and self.adapter.personal_rank:
            raise ValueError(
                "aggregation.method = 'full' has no adapters, got adapter.personal_rank = "
                f"{self.adapter.personal_rank}: leave it out"
            )
        if self.train.task == "preference" and (self.aggregation.method == "full" or self.adapter.init_from):
            raise ValueError(
                "train.task = 'preference' measures against the base as it is, got aggregation.method = 'full' or "
                "adapter.init_from: use another method, without it"
            )
        if self.clients.ranks == AUTO and self.aggregation.method == "full":
            raise ValueError("clients.ranks = 'auto' plans the rank of an adapter, got aggregation.method = 'full'")
        if self.clients.ranks == AUTO and self.run.backend == "ray" and not self.clients.memory:
            raise ValueError(
                "clients.ranks = 'auto' with run.backend = 'ray' has clients beside each other on one machine, got no "
                "clients.memory: say how many GiB each may use"
            )
        if self.aggregation.noise and self.aggregation.method == "full":
            raise ValueError("aggregation.noise compares what methods make of factors, and method 'full' has none")
        head_of(self.train, self.data)
        self._sums_fit(method)
        method.require(self.clients.by_name(), {})
        self._robust_fits()
        if self.privacy.noise_multiplier:
            self._private_fits(method)
        if self.clients.kinds:
            self._mixed_fits(method)
        if not is_lora(self.adapter.kind):
            self._kind_fits(method)
        return self

    def hosted(self) -> Hosted | None:
        """The kind of LoRA that clients train, None for plain LoRA and for kinds that are none."""
        return HOSTED.get(self.adapter.kind)

    def method(self) -> Method:
        """The method with its options, begun where the kind of adapter begins. Raises ValueError for what does not go
        together."""
        method, hosted = self.aggregation.build(), self.hosted()
        return with_offset(method, hosted.name) if hosted and hosted.begins else method

    def _hosted_fits(self) -> None:
        """Raises ValueError for what a kind that is LoRA but in training cannot be with."""
        for hosted in [HOSTED[name] for name in dict.fromkeys(self._kinds()) if name in HOSTED]:
            self._one_hosted_fits(hosted)

    def _kinds(self) -> tuple[str, ...]:
        """What clients may attach, as far as the run says."""
        return tuple(name for name in self.clients.kinds or (self.adapter.kind,) if name != NODE)

    def drops(self) -> bool:
        """Whether a client may reply fewer components than it was ordered to train."""
        kinds = (*self._kinds(), *(HOSTED if self.clients.kinds == (NODE,) else ()))
        return any(HOSTED[name].drops for name in kinds if name in HOSTED)

    def _one_hosted_fits(self, hosted: Hosted) -> None:
        for key, wanted, why in hosted.needs:
            section, _, name = key.partition(".")
            if (found := getattr(getattr(self, section), name)) != wanted:
                raise ValueError(
                    f"adapter.kind = {hosted.name!r} needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}"
                )
        ranks, method = set(self.clients.by_name().values()), self.aggregation.method
        if hosted.begins and len(ranks) > 1 and not self.method().mixed_ranks and self.aggregation.build().mixed_ranks:
            raise ValueError(
                f"adapter.kind = {hosted.name!r} needs clients of one rank with aggregation.method = {method!r}: its "
                f"clients do not carry what their rank lacks of the start, got clients.ranks of {sorted(ranks)}: use "
                "one rank, or a method that carries (flora, warm, fedex, ffa, rolora)"
            )
        if why := "it has no adapters" if method == "full" else hosted.not_with.get(method, ""):
            raise ValueError(
                f"adapter.kind = {hosted.name!r} needs another aggregation.method, got {method!r}: {why}; use 'flora'"
            )

    def _mixed_fits(self, method: Method) -> None:
        """Raises ValueError for what is LoRA's alone, where clients attach different kinds of adapter."""
        for name in self._kinds():
            AdapterConfig.model_validate(self.adapter.model_dump() | {"kind": name})
        ranks = AUTO if self.clients.ranks == AUTO else "given"
        for key, found, wanted, why in (
            ("adapter.kind", self.adapter.kind, "lora", "they send A and B, and that is what the global model is"),
            ("aggregation.method", method.name, "flora", "other methods give clients a start in LoRA's factors"),
            ("clients.ranks", ranks, "given", "a plan is LoRA's"),
            ("train.proximal", self.train.proximal, 0.0, "it measures LoRA's factors"),
            ("train.task", self.train.task if self.train.task == "preference" else "", "", "its reference is LoRA's"),
            ("adapter.personal_rank", self.adapter.personal_rank, None, "it is LoRA beside LoRA"),
        ):
            if found != wanted:
                raise ValueError(f"clients.kinds needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}")

    def _kind_fits(self, method: Method) -> None:
        """Raises ValueError for what is made for LoRA, where clients attach another kind of adapter."""
        ranks = set(self.clients.by_name().values())
        for key, found, wanted, why in (
            ("aggregation.method", method.name, "flora", "each kind has one exact rule, and that method applies it"),
            ("aggregation.server_optimizer", self.aggregation.server_optimizer, "none", "it works on factors"),
            ("aggregation.robust", self.aggregation.robust, "none", "the rules judge factors"),
            ("privacy.noise_multiplier", self.privacy.noise_multiplier, None, "it clips factors"),
            ("secure.sums", self.secure.sums, False, "it sketches factors"),
            ("train.proximal", self.train.proximal, 0.0, "it measures factors"),
            ("train.task", self.train.task if self.train.task == "preference" else "", "", "its reference is LoRA's"),
            ("adapter.personal_rank", self.adapter.personal_rank, None, "it is LoRA beside LoRA"),
            ("adapter.init_from", self.adapter.init_from, None, "it is LoRA"),
            ("adapter.init", self.adapter.init, "shared", "all begin alike"),
            ("clients.target_modules", self.clients.target_modules, None, "all share one basis"),
            ("clients.ranks", len(ranks), 1, "all share one basis, so one number"),
            ("run.alone", self.run.alone and KINDS[self.adapter.kind].shipped, False, "one alone has no bases"),
        ):
            if found != wanted:
                raise ValueError(
                    f"adapter.kind = {self.adapter.kind!r} needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}"
                )

    def _robust_fits(self) -> None:
        """Raises ValueError where the robust rules cannot judge this run's rounds."""
        aggregation = self.aggregation
        aggregation.judge()
        if aggregation.noise and "clip" in aggregation.robust:
            raise ValueError(
                f"aggregation.noise measures methods on replies as they came, got aggregation.robust = "
                f"{aggregation.robust!r}, which counts parts of them: leave one out"
            )
        participants = self.run.participants(self.clients.count)
        if aggregation.byzantine is not None:
            require_majority(aggregation.byzantine, participants)

    def _private_fits(self, method: Method) -> None:
        """Raises ValueError where the run would release what the noise does not cover, or more than its ε."""
        require_linear(method)
        for key, value, wanted, why in (
            (
                "aggregation.weights",
                self.aggregation.weights,
                "uniform",
                "the sum must not depend on what one declares",
            ),
            ("aggregation.robust", self.aggregation.robust, "none", "a choice by replies is no bounded change"),
            ("aggregation.noise", self.aggregation.noise, False, "it writes down what single replies look like"),
            ("run.keep_replies", self.run.keep_replies, False, "it keeps what the noise is to hide"),
            ("run.clients_per_round", self.run.clients_per_round, None, "the accountant assumes Poisson sampling"),
            ("run.min_replies", self.run.min_replies, 1, "a round's success would tell how many came"),
        ):
            if value != wanted:
                raise ValueError(f"privacy needs {key} = {_shown(wanted)}, got {_shown(value)}: {why}")
        if self.privacy.delta >= 1 / self.clients.count:
            raise ValueError(
                f"privacy.delta must be below 1 / clients.count = {1 / self.clients.count:.3g}, got "
                f"{self.privacy.delta:g}: a larger one allows to publish a client whole"
            )
        try:
            spent = self.private().epsilon(self.run.rounds)  # type: ignore[union-attr]
        except ImportError as error:
            raise ValueError(str(error)) from error
        if self.privacy.epsilon is not None and spent > self.privacy.epsilon:
            raise ValueError(
                f"privacy.epsilon = {self.privacy.epsilon:g} must cover all rounds, got {spent:.3f} for run.rounds = "
                f"{self.run.rounds}: raise privacy.noise_multiplier, or lower run.rounds or run.fraction"
            )

    def private(self) -> Privacy | None:
        """The run's differential privacy, None where it has none."""
        noise, clip_norm = self.privacy.noise_multiplier, self.privacy.clip_norm
        if noise is None or clip_norm is None:
            return None
        return Privacy(noise, clip_norm, self.clients.count, self.run.fraction, self.privacy.delta)

    def _sums_fit(self, method: Method) -> None:
        """Raises ValueError where secure sums are asked for beside what needs every client's own change."""
        if not self.secure.sums:
            return
        method.require_of_the_sum()
        if self.run.participants(self.clients.count) < LEAST:
            raise ValueError(
                f"secure.sums needs at least {LEAST} clients a round, got {self.run.participants(self.clients.count)}: "
                "of a sum of two, each of the two knows the other's part"
            )
        for name, found, why in (
            ("aggregation.noise", self.aggregation.noise, "compares methods on every client's reply"),
            ("run.keep_replies", self.run.keep_replies, "keeps every client's reply"),
            ("privacy.noise_multiplier", self.privacy.noise_multiplier, "clips every client's change"),
            ("aggregation.robust", self.aggregation.robust != "none", "judges every client's change"),
        ):
            if found:
                raise ValueError(f"secure.sums hides every client's change, got {name}, which {why}: leave one out")

    def settings(self) -> ClientSettings:
        """What clients are told."""
        return ClientSettings(
            model=self.model,
            data=self.data.model_copy(update={"server_held_out": None}),  # the server's own
            adapter=self.adapter,
            train=self.train,
            clients=self.clients,
            expected=self.expected(),
            rounds=self.run.rounds,
            seed=self.run.seed,
            threads=self.run.threads,
        )

    def spec(self) -> AdapterSpec:
        """What the clients attach, where they all attach the same: at the largest rank, on adapter.target_modules."""
        return self.adapter.spec(self.clients.largest(1)[0], seed=self.run.seed)

    def expected(self) -> Expected:
        """What clients may expect of the method, at the most: the stack of every round before the last, or its cut."""
        method, aggregation = self.method(), self.aggregation
        ranks = self.clients.largest(self.run.participants(self.clients.count))
        start = ranks[0] if method.common_start else 0  # of which a client carries what its rank does not hold
        merged = (self.run.rounds - 1) * (sum(ranks) + 2 * start) + start if method.merges else 0
        if self.adapter.init_from and Path(self.adapter.init_from).is_dir():
            merged += max(rank_of(read_peft_folder(Path(self.adapter.init_from))).values(), default=0)
        caps = [cap for cap in (aggregation.download_rank, aggregation.budget(1).at(1).max_rank) if cap]
        return Expected(
            turns=tuple(dict.fromkeys("".join(sorted(method.constrain(r).trains)) for r in (1, 2))),
            begins=method.common_start,
            frozen_rank=min([merged, *caps]) + start,
        )

    def flat(self) -> dict[str, str | int | float | bool]:
        """`section.name` -> a scalar, as Flower's run config holds it: lists as JSON, what is not set as ""."""
        values = {}
        for section, fields in self.model_dump().items():
            for name, value in fields.items():
                values[f"{section}.{name}"] = (
                    "" if value is None else json.dumps(value) if isinstance(value, tuple) else value
                )
        return values

    @classmethod
    def build(cls, nested: Mapping[str, Any]) -> Self:
        """From nested tables. Raises ConfigError."""
        try:
            return cls.model_validate(dict(nested))
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """From `section.name` -> scalar. Raises ConfigError."""
        nested: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            nested.setdefault(section, {})[name or section] = value
        return cls.build(nested)

    @classmethod
    def load(cls, path: Path | None = None, overrides: Iterable[str] = ()) -> Self:
        """From a TOML file (None: the defaults) and `section.name=value` settings, which win.

        Values are read as TOML, and as plain strings where they are none. Raises ConfigError, and
        FileNotFoundError for a file that is not there.
        """
        values = ({} if path is None else flatten(read_toml(path))) | cls.parse(overrides)
        return cls.from_flat(cls().flat() | one_kind_of_work(values) | values)

    @staticmethod
    def parse(overrides: Iterable[str]) -> dict[str, Any]:
        """`section.name=value` settings as a flat mapping; values are TOML, or plain strings where they are none."""
        values: dict[str, Any] = {}
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or "." not in key:
                raise ConfigError(f"a setting is section.name=value, got {override!r}")
            values[key.strip()] = _parse(value)
        return one_kind_of_work(values) | values


def one_kind_of_work(values: Mapping[str, Any]) -> dict[str, Any]:
    """Who sets one of train.local_steps and train.local_epochs does not want what the other was before."""
    keys = ("train.local_steps", "train.local_epochs")
    return {b: "" for a, b in (keys, keys[::-1]) if values.get(a) not in (None, "")}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises FileNotFoundError, and ConfigError for a file that is not TOML."""
    if not path.is_file():
        raise FileNotFoundError(f"a configuration is a TOML file, got {path}: no such file")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} must be TOML: {error}") from error


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`section.name` -> value. Raises ConfigError for a section that is no table."""
    flat: dict[str, Any] = {}
    for section, fields in nested.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"{section} must be a table, got {fields!r}: write [{section}] and its keys below")
        flat |= {f"{section}.{name}": value for name, value in fields.items()}
    return flat


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _explain(problem: Any) -> str:
    """One line: the key, what was wrong, the value, and the nearest right key where there is none of that name."""
    key = ".".join(str(part) for part in problem["loc"][:2])
    if problem["type"] == "extra_forbidden":
        known = sorted(Config().flat()) if "." in key else sorted(Config.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        return f"{key} is no setting" + (f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
    if problem["type"] == "value_error" and len(problem["loc"]) < 2:
        return problem["msg"].removeprefix("Value error, ")
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"
