"""A suite's file: methods × settings × seeds on the same data and the same budget."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from corolla.aggregation import AGGREGATORS
from corolla.server.config import Config, ConfigError, flatten, one_kind_of_work, read_toml

BASE, LOCAL_ONLY, ONE_ROUND, CENTRALISED = "base", "local-only", "one-round", "centralised"
REFERENCES = (BASE, LOCAL_ONLY, ONE_ROUND, CENTRALISED)
"""The rows that every method is seen beside."""

OWN = {
    "aggregation.method": "list it in methods",
    "run.seed": "list it in seeds",
    "run.out": "say --out",
    "run.alone": "the row local-only is always there",
    "adapter.init_from": "a suite's runs begin at the base",
}
"""Settings that are not the suite file's to make, and what to do instead."""

BUDGET = ("model.", "data.", "clients.", "run.", "train.batch_size", "train.accumulation", "train.local_")
"""Settings (by how they begin) that one method alone may not have: its data and budget would be its own."""


def _flat(table: Any) -> Any:
    """Settings as `"section.name" = value` or as `section.name = value`, which TOML reads as nested tables."""
    if not isinstance(table, dict):
        return table
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    return plain | flatten({key: value for key, value in table.items() if isinstance(value, dict)})


def _known_settings(values: dict[str, Any]) -> dict[str, Any]:
    known = Config().flat()
    for key in values:
        if key in OWN:
            raise ValueError(f"{key} is the suite's own: {OWN[key]}")
        if key not in known:
            raise ValueError(_no_such("setting", key, known))
    return values


def _no_such(kind: str, got: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(got, known, n=1)
    return f"{got} is no {kind}" + (f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


Changes = Annotated[dict[str, Any], BeforeValidator(_flat), AfterValidator(_known_settings)]


class Suite(BaseModel):
    """What is compared. `reference` (default: fedex where it is known, else warm) is the exact run that trajectories
    are measured from; it runs in every setting, named in `methods` or not."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    title: str = "Comparison"
    methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    reference: str = Field(default_factory=lambda: "fedex" if "fedex" in AGGREGATORS else "warm")
    base: Literal["tiny"] | None = None
    config: Changes = {}
    settings: dict[str, Changes] = {"default": {}}
    methods_settings: dict[str, Changes] = Field({}, alias="methods-settings")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name in self.rows:
            if name not in {*AGGREGATORS, *REFERENCES}:
                raise ValueError(_no_such("aggregation method", name, AGGREGATORS))
        for values, kind in ((self.methods, "methods"), (self.seeds, "seeds")):
            if len(set(values)) < len(values):  # type: ignore[arg-type]
                raise ValueError(f"{kind} must differ from one another, got {list(values)}")
        if self.base and any("model.name" in changes for changes in (self.config, *self.settings.values())):
            raise ValueError(f"base = {self.base!r} is the model, got model.name as well: leave one of them out")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        for name in self.settings:
            if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
                raise ValueError(f"a setting's name must be one of a folder (letters, digits, - + . _), got {name!r}")
        for name, changes in self.methods_settings.items():
            if name not in self.rows:
                raise ValueError(_no_such("row of this suite", name, self.rows))
            for key in changes:
                if key.startswith(BUDGET):
                    raise ValueError(
                        f"{key} must be the same for all methods, got one for {name}: put it in [settings]"
                    )
        for setting in self.settings:
            for row in self.rows:
                self._build(setting, row, "flora")
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of every setting: what methods are seen beside, the reference, then the methods."""
        return (*REFERENCES, *dict.fromkeys((self.reference, *self.methods)))

    def run_config(self, setting: str, row: str, seed: int, out: Path, model: str | None = None) -> Config:
        """The configuration of one run; for a row that is no method, FLoRA's. Raises ConfigError where the method
        refuses the setting."""
        own: dict[str, Any] = {"run.seed": seed, "run.out": str(out)} | ({"model.name": model} if model else {})
        config = self._build(setting, row, "flora" if row in REFERENCES else row, own)
        if row != ONE_ROUND:
            return config
        train, rounds = config.train, config.run.rounds
        whole = {f"train.{kind}": rounds * size for kind in KINDS if (size := getattr(train, kind)) is not None}
        return Config.from_flat(config.flat() | whole | {"run.rounds": 1, "run.keep_checkpoints": 1})

    def _build(self, setting: str, row: str, method: str, own: dict[str, Any] | None = None) -> Config:
        values = dict(Config().flat())
        for changes in (
            {"run.evaluate": "never"},
            self.config,
            self.settings[setting],
            self.methods_settings.get(row, {}),
            {"aggregation.method": method},
            own or {},
        ):
            values |= one_kind_of_work(changes) | changes
        if "run.keep_checkpoints" not in self.config | self.settings[setting]:
            values["run.keep_checkpoints"] = values["run.rounds"]  # every round's distance from the exact run
        return Config.from_flat(values)

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a TOML file. Raises FileNotFoundError, and ConfigError naming the key and the nearest right one."""
        return cls.build(read_toml(path))

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """From nested tables. Raises ConfigError."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error


KINDS = ("local_steps", "local_epochs")


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _no_such("key of a suite", key, (f.alias or name for name, f in Suite.model_fields.items()))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}" + ("" if problem["type"] == "missing" else f", got {problem['input']!r}")
