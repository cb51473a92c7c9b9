"""A Flower strategy for low-rank adapters of different ranks: seeded, validated, and exact where its method is.

It needs no configuration of ours and no command line: `examples/own_app.py` uses it in an app of its own.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from corolla.adapters import Kind
from corolla.aggregation import (
    AdapterState,
    Budget,
    Certificate,
    Chosen,
    ClientRule,
    ClientShare,
    ClientUpdate,
    FreshRows,
    GlobalModel,
    Judge,
    Method,
    NoiseOf,
    Principal,
    Shapes,
    Slots,
    Squeeze,
    add_adapters,
    advance,
    aggregate_round,
    build_method,
    client_weights,
    cut,
    moved,
    no_principal,
    ranks,
    require_linear,
    share,
    trust,
    whole,
    without,
)
from corolla.client.protocol import WHOLE, Assignment, Hello, Order, share_digest
from corolla.client.seeding import random_order
from corolla.server.evaluation import OpenEvaluation
from corolla.server.first_gradient import first_adapter
from corolla.server.fleet import Fleet
from corolla.server.privacy import Privacy
from corolla.server.record import OnEvaluation, OnRound, RoundRecord, weighted_mean
from corolla.server.round import OpenRound
from corolla.server.scores import average
from corolla.server.size import reply_too_large, too_large
from corolla.server.stream import Stream
from corolla.server.validation import Rejected


@dataclass(frozen=True)
class Sampling:
    """Who takes part: `clients_per_round` of the clients, or this `fraction` of them; drawn from (seed, round)."""

    fraction: float = 1.0
    clients_per_round: int | None = None

    def draw(self, clients: Iterable[str], seed: int, round_number: int) -> list[str]:
        """The names of the clients of this round, sorted; at least one."""
        names = sorted(clients)
        size = self.clients_per_round or math.ceil(self.fraction * len(names))
        order = random_order(seed, "sample", round_number, size=len(names))
        return sorted(names[i] for i in order[:size])


MOST_OF_THE_WEIGHT = 0.9
"""A client with more of it among three or more is named in the log: what it weighs is its own word."""


NO_ARRAYS = ArrayRecord()
"""What Flower's loop is given for the global model: that is `model`, and a record would be a second copy of it."""


class FederatedLoRA(Strategy):
    """Flower's rounds around a `Method` of corolla.aggregation.

    `modules` are the base's linear modules and convolutions with (out, in), None where the server has no base to know
    them by.
    `kind`, where clients attach something else than LoRA, says what they send and what of the base they must share;
    where its bases are the server's, `first_step` is as in `first_adapter`.
    Where `drops`, they may send fewer components than they were ordered to train.
    The global model is `self.model`; `run` goes through the rounds that are left, and `start` (Flower's own) is what
    it calls. A reply that is not sound is quarantined with its reason and the round goes on; fewer than
    `min_replies` sound ones leave the model as it is. `judge` chooses what the method is given of the sound ones.
    With `privacy`, that draws the clients instead of `sampling`, `weights`, `judge` and `min_replies` do not count,
    and every round releases its noised mean, whoever came; it needs a method that is linear in what a round trains
    (ValueError otherwise). `on_round` is called after each round with the record, the
    new model, and the accepted adapters, before the next round begins; `on_evaluation` after each evaluation with
    the clients' numbers, and the reason for every client that has none.
    """

    def __init__(
        self,
        method: Method | str = "flora",
        *,
        settings: str = "{}",
        run_id: str = "",
        seed: int = 0,
        weights: str = "examples",
        sampling: Sampling = Sampling(),
        clients: int = 1,
        min_replies: int = 1,
        deadline: float = 3600.0,
        largest_message: float = 1.4,
        budget: Budget | Squeeze = Budget(),
        download: Budget = Budget(max_error=1e-3),
        evaluate: str = "ends",
        base_hash: str = "",
        modules: Shapes | None = None,
        kind: Kind | None = None,
        drops: bool = False,
        principal: Principal = no_principal,
        noise: NoiseOf | None = None,
        judge: Judge = trust,
        privacy: Privacy | None = None,
        first_step: float = 1e-4,
        model: GlobalModel | None = None,
        merged: AdapterState | None = None,
        rounds_done: int = 0,
        evaluated: Collection[int] = (),
        on_round: OnRound = lambda record, model, replies: None,
        on_evaluation: OnEvaluation = lambda round_number, clients, failed: None,
    ) -> None:
        self.method = build_method(method) if isinstance(method, str) else method
        if privacy:
            require_linear(self.method)
        self.judge, self.privacy, self.first_step = judge, privacy, first_step
        self.run_id, self.seed, self.weights, self.sampling = run_id, seed, weights, privacy or sampling
        self.wanted, self.min_replies, self.deadline = clients, min_replies, deadline
        self.budget, self.download, self.evaluate = budget, download, evaluate
        self.largest_message, self.modules, self.kind = largest_message, modules, kind
        self.drops = drops
        self.fleet = Fleet(settings, base_hash, deadline)
        self.principal, self.noise = principal, noise
        self.model, self._first_merged = model, merged
        self.rounds_done, self._last_round = rounds_done, rounds_done
        self._evaluated = set(evaluated)
        self.on_round, self.on_evaluation = on_round, on_evaluation
        self._round = OpenRound(rounds_done, self.fleet)
        self._evaluation = OpenEvaluation(())
        self._cut_error = 0.0
        self._sketches: dict[str, Any] = {}
        self._began = time.perf_counter()

    def run(self, grid: Grid, rounds: int) -> Result:
        """Goes on until `rounds` rounds are done in all, with the evaluations before the first and after the last.

        Raises RuntimeError where no client can take part, ValueError where these clients cannot under this method.
        """
        self._last_round = rounds
        grid = cast(Grid, Stream(grid))
        self._meet(grid, self.wanted)
        if self._due() and self.rounds_done not in self._evaluated:
            replies = grid.send_and_receive(self._evaluation_messages(), timeout=self.deadline)
            self.aggregate_evaluate(self.rounds_done, replies)
        left = rounds - self.rounds_done
        return self.start(grid, NO_ARRAYS, left, self.deadline) if left > 0 else Result()

    def start(self, grid: Grid, *args: Any, **options: Any) -> Result:
        """Flower's own loop, on a grid that takes messages as they are made, and gives replies as they come."""
        return super().start(cast(Grid, grid if isinstance(grid, Stream) else Stream(grid)), *args, **options)

    def _due(self) -> bool:
        """Whether the model after `rounds_done` rounds is to be evaluated."""
        return self.evaluate == "each" or (self.evaluate == "ends" and self.rounds_done in (0, self._last_round))

    def summary(self) -> None:
        """Logs what will run."""
        log(20, "%s: %d clients, ranks %s", self.method.name, len(self.fleet.clients), self._ranks())

    def _ranks(self) -> dict[str, int]:
        model = self.model or GlobalModel()
        return {client: model.rank_of(client, hello.rank) for client, hello in self.fleet.clients.items()}

    def _model(self) -> GlobalModel:
        if self.model is None:
            raise RuntimeError("the strategy must have met its clients first: call run, or configure_train")
        return self.model

    def _meet(self, grid: Grid, wanted: int) -> None:
        """Asks new nodes who they are, checks that the method can serve them, and makes the first model."""
        self.fleet.refresh(grid, wanted, self._admit)
        hellos = self.fleet.clients
        if not hellos:
            reasons = "; ".join(f"{who}: {why}" for who, why in self.fleet.refused.items()) or "no node is there"
            raise RuntimeError(f"a run needs at least one client, got none ({reasons})")
        self.method.require(self._ranks(), {client: hello.shapes for client, hello in hellos.items()})
        if self.model and self.model.base_hash not in ("", self.fleet.base_hash):
            raise ValueError(
                f"the run was made on the base {self.model.base_hash}, got clients with {self.fleet.base_hash}: "
                "use the same checkpoint"
            )
        if self.model is None:
            shapes = {m: s for client in sorted(hellos) for m, s in hellos[client].shapes.items()}
            model = self.method.initial(shapes, max(self._ranks().values()), self.seed, self.principal)
            merged = add_adapters(model.merged, self._first_merged or {})
            self.model = GlobalModel(merged, model.start, 0, self.fleet.base_hash, model.method_state)
            if self.kind and self.kind.shipped:
                self.model = replace(self.model, merged=self._first_adapter(grid, self.model))

    def _first_adapter(self, grid: Grid, model: GlobalModel) -> AdapterState:
        """What a kind with shipped bases begins with, from every client's first gradient."""
        if self.modules is None:
            raise ValueError("lora-sb needs the base's configuration on the server, got no base: fetch it there")
        nothing, rule = ClientShare({}, {}, 0.0), ClientRule(trains=frozenset({WHOLE}))
        orders = {c: self._order(0, rank, rule, model.digest(), nothing) for c, rank in self._ranks().items()}
        adapter, self._sketches = first_adapter(
            self.fleet,
            self.modules,
            orders,
            lambda assignment, client: self._message(assignment, client, MessageType.TRAIN),
            lambda messages: grid.send_and_receive(messages, timeout=self.deadline),
            self.weights,
            self.min_replies,
            self.largest_message,
            self.first_step,
        )
        return adapter

    def _admit(self, hello: Hello) -> None:
        """Raises Rejected for a client that cannot join the federation as it is by now.

        A module that the base lacks, once it is merged, would fail every other client's download. A rank that no reply
        can have would still be that of the first model, and take the server's memory.
        """
        for module, shape in {**hello.shapes, **hello.heads}.items():
            known = (self.modules or {}).get(module)
            misfit = module in hello.shapes and known != shape and not self.kind
            if self.modules and (known is None or misfit):
                raise Rejected(
                    f"modules must be linear ones or convolutions of the base, got {module} of shape {shape}: not there"
                )
        if self.kind:
            self._require_one_basis(self.kind, hello)
        rules = [self._rule(1), self._rule(2)]  # of methods that take turns there are two
        if reason := reply_too_large(hello, hello.rank, rules, self.largest_message):
            raise Rejected(reason)
        if self.model is None:
            return
        try:
            self.method.admit(self.model.rank_of(hello.client_id, hello.rank), hello.shapes, self.model)
        except ValueError as error:
            raise Rejected(str(error)) from error

    def _require_one_basis(self, kind: Kind, hello: Hello) -> None:
        """Raises Rejected for a client whose coordinates are not those of the others."""
        if hello.coordinates != self.fleet.coordinates:
            raise Rejected(
                f"{kind.name} needs one basis, one rank and one set of modules, got others than most clients have: use "
                "the same base, rank and target modules everywhere"
            )

    def _rule(self, round_number: int) -> ClientRule:
        """What clients train in this round: what the method says, in the coordinates of their kind."""
        rule = self.method.constrain(round_number)
        return replace(rule, trains=self.kind.trains) if self.kind else rule

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message to each client of the round with its share of the global model, made when it is asked for."""
        self._began = time.perf_counter()
        round_number = self.rounds_done + 1
        self._meet(grid, self.wanted if self.model is None else self.min_replies)
        model = self._model()
        rule = self._rule(model.round + 1)
        reduced, self._cut_error = cut(model, self.download)
        version = model.digest()
        chosen, ranks = self.sampling.draw(self.fleet.clients, self.seed, round_number), self._ranks()
        shapes = {client: self.fleet.clients[client].shapes for client in chosen}
        slots = Slots(shapes, ranks) if rule.trains <= set("AB") else None
        self._round = OpenRound(round_number, self.fleet, slots, self.drops)
        return self._training_messages(reduced, chosen, rule, version)

    def _training_messages(
        self, reduced: GlobalModel, chosen: Iterable[str], rule: ClientRule, version: str
    ) -> Iterator[Message]:
        round_number, ranks = self._round.number, self._ranks()
        for client in chosen:
            part = share(reduced, rule, ranks[client], self.fleet.clients[client].shapes)
            if reason := too_large(self.fleet.clients[client], ranks[client], rule, part, self.largest_message):
                self._round.leave_out(client, reason)
                continue
            order = self._order(round_number, ranks[client], rule, version, part)
            self._round.ask(client, order, part)
            yield self._message(Assignment(order, part.frozen, part.start), client, MessageType.TRAIN)

    def _order(self, round_number: int, rank: int, rule: ClientRule, version: str, part: ClientShare) -> Order:
        return Order(
            round=round_number,
            rank=rank,
            trains="".join(sorted(rule.trains)),
            fresh_round=round_number if rule.fresh_per_round else 0,
            seed=self.seed,
            model=version,
            share=share_digest(part.frozen, part.start),
            base_hash=self.fleet.base_hash,
            settings=self.fleet.settings,
            penalty=float(rule.penalty),
            keep=float(rule.keep),
            run=self.run_id,
        )

    def _message(self, assignment: Assignment, client: str, kind: str) -> Message:
        return Message(
            assignment.pack(),
            dst_node_id=self.fleet.node(client),
            message_type=kind,
            group_id=f"{assignment.order.round}:{client}",
            ttl=self.deadline,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round's outcome from the sound replies; (None, None), and the model as it was, where too few came."""
        accepted, quarantined = self._round.collect(replies, self.deadline)
        updates = [reply.update() for reply in accepted.values()]
        few = f"{len(updates)} sound replies of at least {self.min_replies}" if len(updates) < self.min_replies else ""
        few = "" if self.privacy else few
        return self._close(updates, few, quarantined, {c: reply.adapter for c, reply in accepted.items()}, {})

    def _close(
        self,
        updates: list[ClientUpdate],
        failed: str,
        quarantined: Mapping[str, str],
        replies: Mapping[str, AdapterState],
        facts: dict[str, Any],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Makes the outcome of `updates` the model, unless the round `failed`, and the round's record of it."""
        self.rounds_done += 1
        facts = {"download_error": self._cut_error, **facts}
        if self._sketches:
            facts["first_gradients"], self._sketches = self._sketches, {}
        noise: Mapping[str, Any] = {}
        successful = not failed
        if not successful:
            log(30, "round %d failed: %s", self.rounds_done, failed)
        else:
            try:
                noise = self._take_in(updates, facts)
            except ArithmeticError as error:
                successful, facts["failed"] = False, str(error)
                log(30, "round %d failed, and the model stays as it was: %s", self.rounds_done, error)
        if self.privacy:
            facts["privacy"] = self.privacy.facts(self.rounds_done)
        record = RoundRecord(
            self.rounds_done,
            successful,
            time.perf_counter() - self._began,
            dict(sorted(self._round.clients.items())),
            quarantined,
            facts,
            dict(self.fleet.refused),
            noise,
        )
        self.on_round(record, self._model(), replies)
        if not successful:
            return None, None
        loss = weighted_mean(record.clients, "train_loss", "num_examples")
        return NO_ARRAYS, MetricRecord({"train_loss": loss} if loss is not None else {})

    def _take_in(self, updates: list[ClientUpdate], facts: dict[str, Any]) -> Mapping[str, Any]:
        """Makes the round's outcome the model, puts its facts into `facts`, and returns its noise.

        Raises ArithmeticError where the weights sum to nothing, the judge finds no client that it can trust, or the
        outcome is not finite.
        """
        before = self._model()
        try:
            chosen = self._choose(updates, before)
            outcome = aggregate_round(self.method, chosen.updates, chosen.weights, before, self._heads())
            after, proof = advance(before, outcome, self.budget.at(before.round + 1))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ArithmeticError(str(error)) from error
        if not (after.is_finite() and math.isfinite(proof.error)):
            raise ArithmeticError("the outcome of sound replies must be finite, got NaN or infinity")
        noise = self._measure_noise(chosen, before) if self.noise else {}
        self.model = after
        for client in chosen.counted.keys() & self._round.clients.keys():
            weight = self._round.clients[client]["weight"] = chosen.counted[client]
            if weight > MOST_OF_THE_WEIGHT and len(chosen.counted) > 2:
                log(30, "round %d is all but %s's alone: p_k = %.3f", self.rounds_done, client, weight)
        for client, scores in chosen.scores.items():
            self._round.clients[client]["judged"] = dict(scores)
        size = moved(before, outcome)
        facts |= {"norm": size, "certificate": asdict(self._proof(proof, size)), "version": after.digest()}
        parts: dict[str, AdapterState] = {"merged": after.merged, "start": after.start}
        facts |= {f"{name}_rank": max(ranks(part).values(), default=0) for name, part in parts.items()}
        return noise

    def _choose(self, updates: list[ClientUpdate], before: GlobalModel) -> Chosen:
        """What the method is given. Raises ValueError where no weights can be had, or no client can be trusted."""
        if not self.privacy:
            return self.judge(updates, client_weights(updates, self.weights), before)
        rule = self.method.constrain(before.round + 1)
        (trains,) = rule.trains
        fresh = FreshRows(self.seed, self.rounds_done if rule.fresh_per_round else 0)
        return self.privacy.release(updates, before, trains, fresh, self._whole(trains))

    def _whole(self, trains: str) -> Shapes:
        """The modules that are trained as whole weights by any client, whether it takes part or not."""
        hellos = self.fleet.clients.values()
        adapted = {m: s for hello in hellos for m, s in hello.shapes.items()} if trains == "W" else {}
        return {**adapted, **{m: s for hello in hellos for m, s in hello.heads.items()}}

    def _proof(self, proof: Certificate, size: float) -> Certificate:
        """The certificate of a change of ‖·‖_F = `size`: no proof where the kind's own rule is not exact."""
        return replace(proof, exact=False, reason=self.kind.inexact) if self.kind and self.kind.inexact else proof

    def _heads(self) -> set[str]:
        """The modules that clients train whole."""
        return {module for hello in self.fleet.clients.values() for module in hello.heads}

    def _measure_noise(self, chosen: Chosen, before: GlobalModel) -> Mapping[str, Any]:
        """The noise of the adapters alone, with the chosen weights: heads are averaged by every method."""
        heads = self._heads()
        bodies = [replace(update, adapter=without(update.adapter, heads)) for update in chosen.updates]
        model = replace(before, merged=without(before.merged, heads))
        return self.noise(bodies, chosen.weights, model) if self.noise else {}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The whole global model to every client after the last round, or after each where that is asked for."""
        return self._evaluation_messages() if self._due() else []

    def _evaluation_messages(self) -> Iterator[Message]:
        model = self._model()
        self._evaluation = OpenEvaluation(self.fleet.clients)
        reduced, _ = cut(model, self.download)
        part = ClientShare(whole(reduced), {}, 0.0)
        order = self._order(self.rounds_done, 1, ClientRule(trains=frozenset()), model.digest(), part)
        assignment = Assignment(order, part.frozen, {})
        for client in self.fleet.clients:
            yield self._message(assignment, client, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean metrics, by held-out examples, of the clients that answered."""
        found, failed = self._evaluation.collect(replies, self.deadline)
        if not found and not failed:
            return None
        self.on_evaluation(self.rounds_done, found, failed)
        return MetricRecord(dict(average(found)))
