"""Which settings go together: what a method, a kind of adapter, privacy or secure sums need of the rest of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from corolla.adapters import HOSTED, KINDS, Hosted, is_lora
from corolla.aggregation import Method, require_linear, require_majority
from corolla.client.config import AUTO, AdapterConfig, head_of
from corolla.client.secure.masks import LEAST

if TYPE_CHECKING:
    from corolla.server.config import Config


def require_fitting(config: Config) -> None:
    """Raises ValueError for settings that do not go together, with the keys, their values and the cure."""
    _hosted_fits(config)
    method = config.method()
    _method_fits(config, method)
    if config.aggregation.method == "full":
        _full_fits(config)
    _task_and_engine_fit(config)
    _sums_fit(config, method)
    method.require(config.clients.by_name(), {})
    _robust_fits(config)
    if config.privacy.noise_multiplier:
        _private_fits(config, method)
    if config.clients.kinds:
        _mixed_fits(config, method)
    if not is_lora(config.adapter.kind):
        _kind_fits(config, method)


def _cuts(config: Config) -> list[str]:
    """The keys that cut a part of the global model to a rank."""
    return [name for name in ("max_rank", "download_rank", "server_max_rank") if getattr(config.aggregation, name)]


def _method_fits(config: Config, method: Method) -> None:
    """Raises ValueError for what this aggregation method cannot be with."""
    if config.adapter.init == "independent" and method.common_start:
        raise ValueError(
            f"adapter.init = 'independent' needs clients that draw their own A, got aggregation.method = "
            f"{config.aggregation.method!r} with a start common to all: use 'shared', or method 'flora'"
        )
    if config.aggregation.method == "fr-lora" and (
        found := [name for name in _cuts(config) if name != "server_max_rank"]
    ):
        raise ValueError(
            f"aggregation.method = 'fr-lora' keeps −S in its merged part, got aggregation.{found[0]}, which would "
            "cut it: leave it out"
        )
    if config.train.keep_optimizer and not method.lasting:
        raise ValueError(
            f"train.keep_optimizer needs components that last from round to round, got aggregation.method = "
            f"{config.aggregation.method!r}, which makes new ones: leave it out, or use a method like 'fedit'"
        )


def _full_fits(config: Config) -> None:
    """Raises ValueError for what is an adapter's, where whole weights are trained."""
    if (cuts := _cuts(config)) or config.adapter.init_from:
        raise ValueError(
            "aggregation.method = 'full' moves whole weights, got adapter.init_from or "
            f"aggregation.{'/'.join(cuts) or 'max_rank'}, which are for adapters: leave them out"
        )
    if config.model.quantization != "none":
        raise ValueError(
            f"aggregation.method = 'full' trains the weights themselves, got model.quantization = "
            f"{config.model.quantization!r}: use 'none', or another method"
        )
    if config.adapter.personal_rank:
        raise ValueError(
            "aggregation.method = 'full' has no adapters, got adapter.personal_rank = "
            f"{config.adapter.personal_rank}: leave it out"
        )
    if config.clients.ranks == AUTO:
        raise ValueError("clients.ranks = 'auto' plans the rank of an adapter, got aggregation.method = 'full'")
    if config.aggregation.noise:
        raise ValueError("aggregation.noise compares what methods make of factors, and method 'full' has none")


def _task_and_engine_fit(config: Config) -> None:
    """Raises ValueError for what the task, its evaluation or the engine cannot be with."""
    if config.data.server_held_out and config.run.evaluate == "never":
        raise ValueError(
            "data.server_held_out is evaluated when run.evaluate says so, got run.evaluate = 'never': use 'ends' "
            "or 'each'"
        )
    if config.train.task == "preference" and (config.aggregation.method == "full" or config.adapter.init_from):
        raise ValueError(
            "train.task = 'preference' measures against the base as it is, got aggregation.method = 'full' or "
            "adapter.init_from: use another method, without it"
        )
    if config.clients.ranks == AUTO and config.run.backend == "ray" and not config.clients.memory:
        raise ValueError(
            "clients.ranks = 'auto' with run.backend = 'ray' has clients beside each other on one machine, got no "
            "clients.memory: say how many GiB each may use"
        )
    head_of(config.train, config.data)


def _hosted_fits(config: Config) -> None:
    """Raises ValueError for what a kind that is LoRA but in training cannot be with."""
    for hosted in [HOSTED[name] for name in dict.fromkeys(config.attached()) if name in HOSTED]:
        _one_hosted_fits(config, hosted)


def _one_hosted_fits(config: Config, hosted: Hosted) -> None:
    for key, wanted, why in hosted.needs:
        section, _, name = key.partition(".")
        if (found := getattr(getattr(config, section), name)) != wanted:
            raise ValueError(
                f"adapter.kind = {hosted.name!r} needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}"
            )
    ranks, method = set(config.clients.by_name().values()), config.aggregation.method
    if hosted.begins and len(ranks) > 1 and not config.method().mixed_ranks and config.aggregation.build().mixed_ranks:
        raise ValueError(
            f"adapter.kind = {hosted.name!r} needs clients of one rank with aggregation.method = {method!r}: its "
            f"clients do not carry what their rank lacks of the start, got clients.ranks of {sorted(ranks)}: use "
            "one rank, or a method that carries (flora, warm, fedex, ffa, rolora)"
        )
    if why := "it has no adapters" if method == "full" else hosted.not_with.get(method, ""):
        raise ValueError(
            f"adapter.kind = {hosted.name!r} needs another aggregation.method, got {method!r}: {why}; use 'flora'"
        )


def _mixed_fits(config: Config, method: Method) -> None:
    """Raises ValueError for what is LoRA's alone, where clients attach different kinds of adapter."""
    for name in config.attached():
        AdapterConfig.model_validate(config.adapter.model_dump() | {"kind": name})
    ranks = AUTO if config.clients.ranks == AUTO else "given"
    for key, found, wanted, why in (
        ("adapter.kind", config.adapter.kind, "lora", "they send A and B, and that is what the global model is"),
        ("aggregation.method", method.name, "flora", "other methods give clients a start in LoRA's factors"),
        ("clients.ranks", ranks, "given", "a plan is LoRA's"),
        ("train.proximal", config.train.proximal, 0.0, "it measures LoRA's factors"),
        ("train.task", config.train.task if config.train.task == "preference" else "", "", "its reference is LoRA's"),
        ("adapter.personal_rank", config.adapter.personal_rank, None, "it is LoRA beside LoRA"),
    ):
        if found != wanted:
            raise ValueError(f"clients.kinds needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}")


def _kind_fits(config: Config, method: Method) -> None:
    """Raises ValueError for what is made for LoRA, where clients attach another kind of adapter."""
    ranks = set(config.clients.by_name().values())
    for key, found, wanted, why in (
        ("aggregation.method", method.name, "flora", "each kind has one exact rule, and that method applies it"),
        ("aggregation.server_optimizer", config.aggregation.server_optimizer, "none", "it works on factors"),
        ("aggregation.robust", config.aggregation.robust, "none", "the rules judge factors"),
        ("privacy.noise_multiplier", config.privacy.noise_multiplier, None, "it clips factors"),
        ("secure.sums", config.secure.sums, False, "it sketches factors"),
        ("train.proximal", config.train.proximal, 0.0, "it measures factors"),
        ("train.task", config.train.task if config.train.task == "preference" else "", "", "its reference is LoRA's"),
        ("adapter.personal_rank", config.adapter.personal_rank, None, "it is LoRA beside LoRA"),
        ("adapter.init_from", config.adapter.init_from, None, "it is LoRA"),
        ("adapter.init", config.adapter.init, "shared", "all begin alike"),
        ("clients.target_modules", config.clients.target_modules, None, "all share one basis"),
        ("clients.ranks", len(ranks), 1, "all share one basis, so one number"),
        ("run.alone", config.run.alone and KINDS[config.adapter.kind].shipped, False, "one alone has no bases"),
    ):
        if found != wanted:
            raise ValueError(
                f"adapter.kind = {config.adapter.kind!r} needs {key} = {_shown(wanted)}, got {_shown(found)}: {why}"
            )


def _robust_fits(config: Config) -> None:
    """Raises ValueError where the robust rules cannot judge this run's rounds."""
    aggregation = config.aggregation
    aggregation.judge()
    if aggregation.noise and "clip" in aggregation.robust:
        raise ValueError(
            f"aggregation.noise measures methods on replies as they came, got aggregation.robust = "
            f"{aggregation.robust!r}, which counts parts of them: leave one out"
        )
    participants = config.run.participants(config.clients.count)
    if aggregation.byzantine is not None:
        require_majority(aggregation.byzantine, participants)


def _private_fits(config: Config, method: Method) -> None:
    """Raises ValueError where the run would release what the noise does not cover, or more than its ε."""
    require_linear(method)
    for key, value, wanted, why in (
        (
            "aggregation.weights",
            config.aggregation.weights,
            "uniform",
            "the sum must not depend on what one declares",
        ),
        ("aggregation.robust", config.aggregation.robust, "none", "a choice by replies is no bounded change"),
        ("aggregation.noise", config.aggregation.noise, False, "it writes down what single replies look like"),
        ("run.keep_replies", config.run.keep_replies, False, "it keeps what the noise is to hide"),
        ("run.clients_per_round", config.run.clients_per_round, None, "the accountant assumes Poisson sampling"),
        ("run.min_replies", config.run.min_replies, 1, "a round's success would tell how many came"),
    ):
        if value != wanted:
            raise ValueError(f"privacy needs {key} = {_shown(wanted)}, got {_shown(value)}: {why}")
    if config.privacy.delta >= 1 / config.clients.count:
        raise ValueError(
            f"privacy.delta must be below 1 / clients.count = {1 / config.clients.count:.3g}, got "
            f"{config.privacy.delta:g}: a larger one allows to publish a client whole"
        )
    try:
        spent = config.private().epsilon(config.run.rounds)  # type: ignore[union-attr]
    except ImportError as error:
        raise ValueError(str(error)) from error
    if config.privacy.epsilon is not None and spent > config.privacy.epsilon:
        raise ValueError(
            f"privacy.epsilon = {config.privacy.epsilon:g} must cover all rounds, got {spent:.3f} for run.rounds = "
            f"{config.run.rounds}: raise privacy.noise_multiplier, or lower run.rounds or run.fraction"
        )


def _sums_fit(config: Config, method: Method) -> None:
    """Raises ValueError where secure sums are asked for beside what needs every client's own change."""
    if not config.secure.sums:
        return
    method.require_of_the_sum()
    if config.run.participants(config.clients.count) < LEAST:
        raise ValueError(
            f"secure.sums needs at least {LEAST} clients a round, got {config.run.participants(config.clients.count)}: "
            "of a sum of two, each of the two knows the other's part"
        )
    for name, found, why in (
        ("aggregation.noise", config.aggregation.noise, "compares methods on every client's reply"),
        ("run.keep_replies", config.run.keep_replies, "keeps every client's reply"),
        ("privacy.noise_multiplier", config.privacy.noise_multiplier, "clips every client's change"),
        ("aggregation.robust", config.aggregation.robust != "none", "judges every client's change"),
    ):
        if found:
            raise ValueError(f"secure.sums hides every client's change, got {name}, which {why}: leave one out")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
