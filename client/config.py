"""The settings that a client obeys: model, data, adapter, train. Read once, frozen, unknown keys refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from transformers.training_args import OptimizerNames

from corolla.adapters import DEMO, HOSTED, LORA, AdapterSpec, Base, Head, kind_names, open_base, require_mixable
from corolla.aggregation import parse_halved
from corolla.client.tasks import TASKS

DType = Literal["float32", "bfloat16", "float16"]

GENERATED = "tasks"
"""The data source that needs no file: instruction tasks generated from a seed (`corolla.client.data.generated`)."""


def parse_targets(value: Any) -> Any:
    """A JSON list in a string is a list: Flower's run config holds scalars only."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    return tuple(value) if isinstance(value, list) else value


def parse_labels(value: Any) -> Any:
    """A JSON list of strings in a string, "" for none."""
    value = json.loads(value) if isinstance(value, str) and value else value or ()
    return tuple(str(label) for label in value) if isinstance(value, list | tuple) else value


Targets = Annotated[str | tuple[str, ...], BeforeValidator(parse_targets)]


class Section(BaseModel):
    """One table of the configuration: frozen, no unknown keys; an empty string means "not set" where that may be."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if field.default is None}
        return {k: None if v == "" and k in optional else v for k, v in values.items()}


class ModelConfig(Section):
    """The base model."""

    name: str = Field(DEMO, description="hub id, local folder, .gguf file, or the demo's alias")
    dtype: DType = Field("float32", description="precision that the base is opened in; recorded, not part of its hash")
    device: str = Field(
        "auto", description="auto (CUDA where there is one), cpu, cuda, cuda:1 …, or balanced: over several GPUs"
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="how the base's linear weights are held: by bitsandbytes, in 4 or 8 bits"
    )
    attention: str = Field("auto", description="attention implementation: auto, sdpa, eager, flash_attention_2 …")
    hash: str | None = Field(
        None, description="the base's SHA-256 that every client must have; taken from the base if unset"
    )

    def open(self, head: Head) -> Base:
        """The base with this head. Raises what `open_base` raises."""
        return open_base(
            self.name, self.dtype, self.device, head=head, quantization=self.quantization, attention=self.attention
        )


class DataConfig(Section):
    """Where a client's examples come from."""

    train: str = Field(
        GENERATED,
        description="a file, a folder or a hub id ({client} in its name: one a client), or 'tasks': generated",
    )
    held_out: str | None = Field(None, description="the same for held-out examples; unset: a part of the training rows")
    server_held_out: str | None = Field(None, description="held-out examples that the server evaluates on")
    held_out_fraction: float = Field(0.1, ge=0, lt=1, description="that part, where held_out is unset")
    split: str = Field("train", description="of a folder or a hub id: train, test, train[:1000] …")
    subset: str | None = Field(None, description="of a hub id: its configuration")
    format: str = Field(
        "auto",
        description="auto: by the columns; or prompt-completion, instruction, chat, text, text-label, preference",
    )
    prompt: str = Field("prompt", description="column with the prompt")
    completion: str = Field("completion", description="column with the answer")
    group: str = Field("family", description="column by which results are told apart, where the rows have it")
    partition: Literal["column", "iid", "dirichlet", "pathological", "linear", "square", "exponential"] = Field(
        "column",
        description="how rows are split: whole values of a column; at random; labels by Dirichlet; a few labels each; "
        "or at random in sizes 1, 2, 3 …, their squares, their exponentials",
    )
    partition_column: str = Field("family", description="the column of values or labels")
    partition_alpha: float = Field(0.5, gt=0, description="dirichlet: the smaller, the more skewed")
    partition_labels: int = Field(2, ge=1, description="pathological: labels of each client")
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's; plain: prompt, newline"
    )
    labels: Annotated[tuple[str, ...], BeforeValidator(parse_labels)] = Field(
        (), description="classification: the labels, in an order that all clients share"
    )
    system: str | None = Field(None, description="system message before every prompt; unset: what the template does")
    probe: int = Field(8, ge=1, description="held-out examples whose loss is taken before and after local training")
    max_new_tokens: int = Field(32, ge=0, description="longest answer in evaluation, in tokens; 0: loss alone")
    tasks_train: int = Field(64, ge=1, description="generated training examples per family")
    tasks_held_out: int = Field(10, ge=1, description="generated held-out examples per family")
    tasks_seed: int = Field(0, description="seed of the generated tasks")


class AdapterConfig(Section):
    """What clients attach: LoRA, or another kind of adapter; its rank is each client's own."""

    kind: str = Field(LORA, description=f"one of {', '.join(kind_names())}: `corolla adapters` says what each sends")

    target_modules: Targets = Field(("q_proj", "v_proj"), description="PEFT's rule: names, a regex, or 'all-linear'")
    alpha: float | None = Field(None, gt=0, description="lora_alpha, the same for all ranks; unset: from scaling")
    scaling: float = Field(2.0, gt=0, description="alpha / rank (or alpha / √rank with rslora), the same for all ranks")
    rslora: bool = Field(False, description="divide alpha by √rank instead of rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout in training")
    init: Literal["shared", "independent"] = Field("shared", description="whether clients share their fresh rows of A")
    personal_rank: int | None = Field(
        None, ge=1, description="a second adapter of this rank that every client trains along and keeps to itself"
    )
    init_from: str | None = Field(None, description="a PEFT adapter folder: the starting point of the global model")
    sora_threshold: float = Field(0.1, ge=0, description="sora: ξ; each step takes learning rate · ξ off a component")
    allora_eta: float = Field(10.0, gt=0, description="allora: η, the rate of a row's gradients before it has moved")

    sb_step: float = Field(
        1e-4, ge=0, description="lora-sb: η; C begins as long as a step -η of every weight, along the first gradient"
    )

    def spec(
        self, rank: int, targets: str | tuple[str, ...] | None = None, exclude: tuple[str, ...] = (), seed: int = 0
    ) -> AdapterSpec:
        """The adapter of a client of `rank`, on its own target modules where it has them, but not on those excluded.

        `seed` is the run's.
        """
        alpha = self.alpha or self.scaling * (math.sqrt(rank) if self.rslora else rank)
        targets = targets or self.target_modules
        spec = AdapterSpec(rank, alpha, targets, self.rslora, self.dropout, exclude, self.kind, seed)
        return replace(spec, sora_threshold=self.sora_threshold, allora_eta=self.allora_eta)

    @model_validator(mode="after")
    def _hosted_kind_fits(self) -> Self:
        if self.kind in HOSTED:
            scaling = None if self.scaling == AdapterConfig.model_fields["scaling"].default else self.scaling
            HOSTED[self.kind].require(self.alpha, scaling, self.dropout)
        return self

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in kind_names():
            raise ValueError(f"must be one of {', '.join(kind_names())}")
        return value


class TrainConfig(Section):
    """Local training, in the terms of transformers' Trainer."""

    task: str = Field("causal-lm", description=f"what is learned: one of {', '.join(TASKS)}")
    optimizer: str = Field("adamw_torch", description="an optimizer by transformers' name")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = Field(
        "linear", description="learning-rate schedule over the whole run, not over a round"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="part of the whole run's steps that warms up")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="examples per micro-batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
    local_steps: int | None = Field(None, ge=1, description="optimizer steps a round; set this or local_epochs")
    local_epochs: float | None = Field(None, gt=0, description="passes over the client's data a round")
    max_length: int = Field(512, ge=8, description="longest example in tokens; longer ones are left out and counted")
    batching: Literal["padded", "padding-free", "packed"] = Field(
        "padded", description="padding-free: a micro-batch as one sequence; packed: rows of up to max_length, made once"
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    compile: str = Field("none", description="a backend of torch.compile, such as inductor; compiled anew each round")
    proximal: float = Field(0.0, ge=0, description="FedProx: μ of μ/2 ‖ΔW − ΔW₀‖², added to the loss")
    keep_optimizer: bool = Field(
        False, description="the optimizer's moments stay on the client from round to round (not in flora)"
    )
    beta: float = Field(0.1, gt=0, description="preference: how strongly DPO holds on to the base")
    dtype: DType = Field("float32", description="autocast precision of training; adapters stay in float32")

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"must be one of {', '.join(TASKS)}")
        return value

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in (known := [name.value for name in OptimizerNames]):
            raise ValueError(f"must be one of {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _batching_fits(self) -> Self:
        if self.batching not in (known := TASKS[self.task].batchings):
            raise ValueError(
                f"train.batching must be one of {', '.join(known)} for task {self.task!r}, got {self.batching!r}"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                f"set one of train.local_steps and train.local_epochs, got {self.local_steps} and {self.local_epochs}"
            )
        return self

    def steps(self, examples: int) -> int:
        """Optimizer steps of one round for a client with so many examples."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, math.ceil((self.local_epochs or 0) * examples / (self.batch_size * self.accumulation)))


def _parse_ranks(value: Any) -> Any:
    """ "32" and "[32, 16]" in a string are numbers: Flower's run config holds scalars only."""
    if isinstance(value, str) and value.strip().lstrip("[")[:1].isdigit() and ".." not in value:
        value = json.loads(value)
    return tuple(value) if isinstance(value, list) else value


def _parse_memory(value: Any) -> Any:
    """A number, or a JSON list of numbers in a string."""
    value = json.loads(value) if isinstance(value, str) and value else value
    return (value,) if isinstance(value, int | float) else tuple(value) if isinstance(value, list) else value


def _parse_target_list(value: Any) -> Any:
    """As `parse_targets`, for a list with one entry per client."""
    value = json.loads(value) if isinstance(value, str) and value else value
    return tuple(parse_targets(entry) for entry in value) if isinstance(value, list | tuple) else value


def _parse_kinds(value: Any) -> Any:
    """A list, one name, or a JSON list in a string."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else value or None
    return (value,) if isinstance(value, str) else value


def client_name(partition: int) -> str:
    """The name of a client that has none of its own."""
    return f"client-{partition:03}"


def node_name(node: Mapping[str, Any]) -> str:
    """The name of the client that a node of this configuration is."""
    return str(node.get("name", client_name(int(node.get("partition-id", 0)))))


NODE, AUTO = "node", "auto"
"""The rules for ranks that leave them to the nodes: each declares its own, or takes the largest that it can afford."""


class ClientsConfig(Section):
    """The population: how many clients, and the rank of each."""

    count: int = Field(4, ge=1, description="number of clients")
    ranks: Annotated[int | tuple[int, ...] | str, BeforeValidator(_parse_ranks)] = Field(
        (32, 16, 8, 4),
        description="one rank, a list (repeated), '32..4' (halving, repeated), 'node': each declares its own, or "
        "'auto': the largest that its memory allows",
    )
    max_rank: int = Field(64, ge=1, description="auto and node: the largest rank that is expected")
    memory: Annotated[tuple[float, ...] | None, BeforeValidator(_parse_memory)] = Field(
        None, description="auto: GiB that each simulated client may use (repeated); unset: what its device has free"
    )
    target_modules: Annotated[tuple[Targets, ...] | None, BeforeValidator(_parse_target_list)] = Field(
        None, description="target modules by client (repeated), where they differ from adapter.target_modules"
    )

    kinds: Annotated[tuple[str, ...] | None, BeforeValidator(_parse_kinds)] = Field(
        None,
        description="kinds of adapter by client (repeated), or 'node': each declares its own, else LoRA; unset: "
        "adapter.kind for all",
    )

    @field_validator("kinds")
    @classmethod
    def _kinds_mix(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value == ():
            raise ValueError("must name a kind at least, or be unset")
        for name in value or ():
            if value != (NODE,):
                require_mixable(name)
        return value

    def kind(self, partition: int) -> str | None:
        """The kind of client number `partition`; None where the run or the node says."""
        if not self.kinds or self.kinds == (NODE,):
            return None
        return self.kinds[partition % len(self.kinds)]

    @model_validator(mode="after")
    def _ranks_make_sense(self) -> Self:
        if self.ranks not in (NODE, AUTO) and min(self._list(), default=0) < 1:
            raise ValueError(f"clients.ranks must be at least 1, got {self.ranks!r}")
        if self.memory is not None and not min(self.memory, default=0) > 0:
            raise ValueError(f"clients.memory must be GiB above 0, got {list(self.memory)}")
        if self.memory and self.ranks != AUTO:
            raise ValueError(f"clients.memory is for clients.ranks = 'auto', got {self.ranks!r}: leave it out")
        return self

    def _list(self) -> tuple[int, ...]:
        if isinstance(self.ranks, int):
            return (self.ranks,)
        if not isinstance(self.ranks, str):
            return self.ranks
        try:
            return parse_halved(self.ranks)
        except ValueError as error:
            raise ValueError(
                f"clients.ranks must be a rank, a list, '32..4', 'node' or 'auto', got {self.ranks!r}"
            ) from error

    def rank(self, partition: int) -> int | None:
        """The rank of client number `partition`; None where the node declares or plans it."""
        ranks = () if self.ranks in (NODE, AUTO) else self._list()
        return ranks[partition % len(ranks)] if ranks else None

    def by_name(self) -> dict[str, int]:
        """The rank of every simulated client by its name; empty where the nodes declare them."""
        known = {client_name(k): self.rank(k) for k in range(self.count)}
        return {name: rank for name, rank in known.items() if rank is not None}

    def largest(self, count: int) -> list[int]:
        """The ranks of so many clients at the most, the largest first; max_rank where the nodes say."""
        known = sorted(self.by_name().values(), reverse=True) or [self.max_rank] * self.count
        return known[:count]

    def budget(self, partition: int) -> float | None:
        """Bytes that client number `partition` may use; None for what its device has free."""
        return 2**30 * self.memory[partition % len(self.memory)] if self.memory else None

    def targets(self, partition: int) -> str | tuple[str, ...] | None:
        """The target modules of client number `partition`; None for those of all."""
        return self.target_modules[partition % len(self.target_modules)] if self.target_modules else None


class Expected(Section):
    """What a client may expect of the method: which factors it trains, and what will come with its orders."""

    turns: tuple[str, ...] = Field(("AB",), description="factors that are trained, round by round in turn")
    begins: bool = Field(False, description="whether a start of the client's rank comes")
    frozen_rank: int = Field(
        0, ge=0, description="largest rank of the frozen part, in the last round; no module's exceeds its narrow side"
    )


class ClientSettings(Section):
    """What the server tells every client: the sections that it obeys, and what seeds and spans the run."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    train: TrainConfig
    clients: ClientsConfig
    expected: Expected = Expected()
    rounds: int = Field(ge=1, description="rounds of the whole run, which the schedule spans")
    seed: int = 0
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: every core this process may use")

    @property
    def head(self) -> Head:
        """What the base ends with. Raises ValueError for labels that do not fit the task."""
        return head_of(self.train, self.data)


def head_of(train: TrainConfig, data: DataConfig) -> Head:
    """The head that a task needs. Raises ValueError for labels that do not fit it."""
    return Head(TASKS[train.task].head, data.labels)
