"""The whole configuration: one model, read from TOML, from `key=value`, and from Flower's run config."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from corolla.adapters import HOSTED, AdapterSpec, Hosted, read_peft_folder
from corolla.aggregation import Method, with_offset
from corolla.aggregation import ranks as rank_of
from corolla.client.config import (
    NODE,
    AdapterConfig,
    ClientsConfig,
    ClientSettings,
    DataConfig,
    Expected,
    ModelConfig,
    Section,
    TrainConfig,
)
from corolla.server.fits import require_fitting
from corolla.server.privacy import Privacy
from corolla.server.sections import AggregationConfig, PrivacyConfig, RunConfig, SecureConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key, its value and the cure."""


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
        require_fitting(self)
        return self

    def hosted(self) -> Hosted | None:
        """The kind of LoRA that clients train, None for plain LoRA and for kinds that are none."""
        return HOSTED.get(self.adapter.kind)

    def method(self) -> Method:
        """The method with its options, begun where the kind of adapter begins. Raises ValueError for what does not go
        together."""
        method, hosted = self.aggregation.build(), self.hosted()
        return with_offset(method, hosted.name) if hosted and hosted.begins else method

    def attached(self) -> tuple[str, ...]:
        """What clients may attach, as far as the run says."""
        return tuple(name for name in self.clients.kinds or (self.adapter.kind,) if name != NODE)

    def drops(self) -> bool:
        """Whether a client may reply fewer components than it was ordered to train."""
        kinds = (*self.attached(), *(HOSTED if self.clients.kinds == (NODE,) else ()))
        return any(HOSTED[name].drops for name in kinds if name in HOSTED)

    def private(self) -> Privacy | None:
        """The run's differential privacy, None where it has none."""
        noise, clip_norm = self.privacy.noise_multiplier, self.privacy.clip_norm
        if noise is None or clip_norm is None:
            return None
        return Privacy(noise, clip_norm, self.clients.count, self.run.fraction, self.privacy.delta)

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
