"""One client: what it answers to hello, train and evaluate. No Flower here, so a test or a notebook can call it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from corolla.adapters import (
    KINDS,
    LORA,
    AdapterSpec,
    Base,
    Kind,
    Penalty,
    carrying,
    head_shapes,
    kind_shapes,
    on_weights,
    proximal_penalty,
    tail_penalty,
    target_shapes,
    unfolded_shapes,
)
from corolla.aggregation import (
    AdapterState,
    FreshRows,
    LowRankState,
    Shapes,
    add_adapters,
    delta_of,
    fill_adapter,
    low_rank,
)
from corolla.client.afford import Limits, free_memory, is_out_of_memory
from corolla.client.attach import Attached, Part, trainable
from corolla.client.config import ClientSettings, TrainConfig
from corolla.client.data import ClientData, round_order
from corolla.client.first_gradient import sketch_first_gradient
from corolla.client.protocol import WHOLE, Assignment, Hello, Order, Reply
from corolla.client.seeding import seed_of
from corolla.client.store import Store, under
from corolla.client.tasks import Task, find_task
from corolla.client.training import train_round

PERSONAL, MOMENTS = "personal", "optimizer"
"""What a client keeps, by the prefix of its names."""


@dataclass(frozen=True)
class Client:
    """A client with its base open and its data loaded.

    `rows` are what it trains on: its examples, or several packed in one. `keeps` is the folder of what stays with it
    from round to round, None where the node has none. `limits` are what it can afford, None where that is not known.
    """

    client_id: str
    rank: int
    targets: str | tuple[str, ...] | None
    base: Base
    data: ClientData
    rows: tuple[Any, ...]
    settings: ClientSettings
    keeps: Path | None = None
    limits: Limits | None = None

    @property
    def task(self) -> Task:
        """What it learns."""
        return find_task(self.settings.train.task)

    def spec(self, rank: int) -> AdapterSpec:
        """The LoRA that it attaches at `rank`, on everything but its head."""
        return self.settings.adapter.spec(rank, self.targets, tuple(self._heads()), self.settings.seed)

    def _heads(self) -> Shapes:
        return head_shapes(self.base.model, self.base.head)

    def hello(self) -> Hello:
        """Who it is."""
        shapes, rank, basis = self._adapted()
        return Hello(self.client_id, rank, self.base.hash, len(self.data.train), shapes, self._heads(), basis=basis)

    @property
    def kind(self) -> Kind | None:
        """What it attaches, None for LoRA."""
        return KINDS.get(self.settings.adapter.kind)

    @property
    def travels(self) -> Kind | None:
        """The kind in whose coordinates it sends and receives; None for changes of the weights."""
        return None if self.settings.clients.kinds else self.kind

    def _adapted(self) -> tuple[Shapes, int, str]:
        """The shapes of what it sends, of how many components, and the hash of the basis of its coordinates."""
        if self.travels:
            shapes, basis = _kind_shapes(self.base, self.spec(self.rank))
            return shapes, self.travels.components(self.rank), basis
        if self.kind:
            return *_unfolded_shapes(self.base, self.spec(self.rank)), ""
        return _target_shapes(self.base, self.spec(1)), self.rank, ""

    def _shapes(self) -> Shapes:
        return self._adapted()[0]

    def on_weights(self, frozen: AdapterState) -> AdapterState:
        """What the global model changes of the base's weights."""
        return on_weights(self.base.model, self.spec(self.rank), frozen) if self.travels else frozen

    def train(self, assignment: Assignment) -> Reply:
        """Trains its share of the global model on the next examples of its order, and replies L_k in absolute factors.

        Where memory runs out it begins again with half the micro-batch, then half the rank, and the metrics say so:
        out_of_memory (how often), micro_batch, accumulation and trained_rank. The base is put back as it was. Raises
        ValueError for an order meant for another base, or a start that does not fit its modules; RuntimeError where
        the loss is not finite, or no batch and rank is small enough.
        """
        self._require_base(assignment)
        train, order = self.settings.train, assignment.order
        limits: Limits | None = Limits(train.batch_size, train.accumulation, order.rank)
        limits = limits.within(self.limits) if limits and self.limits else limits
        failures = 0
        while limits:
            try:
                reply = self._train(assignment, limits)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                tried, limits = limits, limits.halved()
                if (order.trains == WHOLE or self.kind) and limits and limits.rank < tried.rank:
                    limits = None  # whole weights have no rank, and that of other kinds is part of their basis
                failures, last = failures + 1, str(error)
                free_memory()
                continue
            found = {"micro_batch": limits.micro_batch, "accumulation": limits.accumulation}
            found |= {"trained_rank": limits.rank, "out_of_memory": failures}
            return replace(reply, metrics={**reply.metrics, **found})
        raise RuntimeError(
            f"local training needs more memory even with micro-batch {tried.micro_batch} and rank {tried.rank}, got "
            f"{last}: use a smaller base, train.max_length, or train.checkpointing"
        )

    def _sketch(self, order: Order, train: TrainConfig) -> Reply:
        """Two sketches of the first gradient of every module, where the kind's bases are made of those."""
        if not (self.travels and self.travels.shipped):
            raise ValueError(
                f"round 0 asks for sketches of the first gradient, got adapter.kind = {self.settings.adapter.kind!r}, "
                "which needs none: this client gives none"
            )
        spec, examples = self.spec(order.rank), self._examples(1)
        shapes = _target_shapes(self.base, replace(spec, kind=LORA))
        found = sketch_first_gradient(self.base, spec, shapes, order.rank, order.seed, train, examples)
        return self._reply(order, len(examples), found, {})

    def _train(self, assignment: Assignment, limits: Limits) -> Reply:
        order, settings = assignment.order, self.settings
        config = settings.train.model_copy(
            update={"batch_size": limits.micro_batch, "accumulation": limits.accumulation}
        )
        if order.round == 0:
            return self._sketch(order, config)
        examples = self._examples(order.round)
        kept = self._kept(order)
        moments = under(kept, MOMENTS) if config.keep_optimizer else None
        with trainable(self.base.model, assignment, self._part(order, limits.rank, under(kept, PERSONAL))) as work:
            metrics = {**self.data.left_out, "loss_before": self._probe_loss(work.model)}
            seed = seed_of(order.seed, self.client_id, order.round)
            metrics |= train_round(
                work.model,
                self.base,
                config,
                examples,
                order.round,
                settings.rounds,
                seed,
                _penalty(work, order, config),
                moments,
                work.callbacks,
            )
            metrics["loss_after"] = self._probe_loss(work.model)
            adapter = work.read()
            personal = work.read_personal() if settings.adapter.personal_rank else {}
        self._keep(order, personal, moments or {})
        return self._reply(order, sum(getattr(example, "count", 1) for example in examples), adapter, metrics)

    def _reply(self, order: Order, processed: int, adapter: AdapterState, metrics: Mapping[str, float]) -> Reply:
        who = self.client_id, order.round, order.model, self.base.hash, len(self.data.train)
        return Reply(*who, processed, adapter, metrics, order.trains)

    def _part(self, order: Order, rank: int, personal: Mapping[str, Tensor]) -> Part:
        client = self.client_id if self.settings.adapter.init == "independent" else ""
        own = None
        if width := self.settings.adapter.personal_rank:
            fresh = FreshRows(order.seed, 0, f"{self.client_id}/{PERSONAL}")
            own = self.spec(width), fill_adapter(_adapter(personal), self._shapes(), width, fresh)
        spec = self.spec(self.rank if self.kind else order.rank)
        seed = seed_of(order.seed, self.client_id, order.round)
        return Part(spec, self._shapes(), self._heads(), client, rank, own, seed, self.travels is None)

    def evaluate(self, assignment: Assignment) -> dict[str, float]:
        """The received model, all of it frozen, on this client's held-out examples: loss and score.

        Where it has a personal adapter, the same with that added, as personal_<name>.
        """
        self._require_base(assignment)
        frozen = self.on_weights(assignment.frozen)
        found = self._evaluate(frozen)
        with carrying(self.base.model, frozen) as model:
            found["probe_loss"] = self._probe_loss(model)
        if self.settings.adapter.personal_rank:
            after = replace(assignment.order, round=assignment.order.round + 1)
            own = _adapter(under(self._kept(after), PERSONAL))
            personal = self._evaluate(add_adapters(frozen, own)) if own else found
            found |= {f"personal_{k}": v for k, v in personal.items() if not k.startswith(("examples", "probe"))}
        return found

    def _evaluate(self, frozen: Any) -> dict[str, float]:
        with carrying(self.base.model, frozen) as model:
            return self.task.evaluate(model.eval(), self.base, self.data.held_out, self.settings.data)

    def _probe_loss(self, model: Any) -> float:
        return self.task.mean_loss(
            model.eval(), self.base, (self.data.held_out or self.data.train)[: self.settings.data.probe]
        )

    def _examples(self, round_number: int) -> list[Any]:
        """This round's examples: a pure function of seed, client and round, whoever took part before."""
        train, size = self.settings.train, len(self.rows)
        count = train.steps(size) * train.batch_size * train.accumulation
        order = round_order(size, (round_number - 1) * count, count, self.settings.seed, self.client_id)
        return [self.rows[i] for i in order]

    def _store(self, order: Order) -> Store | None:
        """Where this run keeps what stays here; None where nothing does. Raises ValueError for a node without it."""
        if not (self.settings.adapter.personal_rank or self.settings.train.keep_optimizer):
            return None
        if self.keeps is None:
            raise ValueError(
                "adapter.personal_rank and train.keep_optimizer need a folder on the client, got none at "
                f"{self.client_id}: set state='/a/folder' in the node's configuration"
            )
        return Store.of(self.keeps, order.run, self.client_id)

    def _kept(self, order: Order) -> dict[str, Tensor]:
        store = self._store(order)
        return store.load(order.round) if store else {}

    def _keep(self, order: Order, personal: LowRankState, moments: Mapping[str, Tensor]) -> None:
        if store := self._store(order):
            factors = {f"{PERSONAL}/{m}/{n}": x for m, delta in personal.items() for n, x in delta.tensors().items()}
            store.save(order.round, factors | {f"{MOMENTS}/{name}": tensor for name, tensor in moments.items()})

    def _require_base(self, assignment: Assignment) -> None:
        if assignment.order.base_hash != self.base.hash:
            raise ValueError(
                f"the order is for the base {assignment.order.base_hash}, got {self.base.hash} from "
                f"{self.base.source.name}: use the same checkpoint as the server"
            )


def _penalty(work: Attached, order: Order, config: TrainConfig) -> Penalty | None:
    """What is added to the loss: what the method asks of every client, and FedProx."""
    terms: list[Penalty] = []
    if order.penalty:
        terms.append(lambda model: order.penalty * tail_penalty(model, order.keep))
    if config.proximal:
        terms.append(proximal_penalty(work.base if order.trains == WHOLE else work.model, config.proximal))
    return (lambda model: sum(term(model) for term in terms)) if terms else None  # type: ignore[return-value]


def _adapter(tensors: Mapping[str, Tensor]) -> LowRankState:
    """What `Client._keep` wrote, by module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition("/")
        modules.setdefault(module, {})[factor] = tensor
    return low_rank({module: delta_of(module, factors) for module, factors in modules.items()})


@lru_cache(maxsize=16)
def _target_shapes(base: Base, spec: AdapterSpec) -> Shapes:
    return target_shapes(base.model, spec)


@lru_cache(maxsize=16)
def _unfolded_shapes(base: Base, spec: AdapterSpec) -> tuple[Shapes, int]:
    return unfolded_shapes(base.model, KINDS[spec.kind], spec)


@lru_cache(maxsize=16)
def _kind_shapes(base: Base, spec: AdapterSpec) -> tuple[Shapes, str]:
    return kind_shapes(base.model, KINDS[spec.kind], spec)
