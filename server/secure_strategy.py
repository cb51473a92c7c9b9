"""Rounds in which the server learns a sum of the clients' changes, and no client's own."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from corolla.aggregation import Certificate, ClientUpdate, Delta, DenseDelta, LowRankDelta, add
from corolla.aggregation.exact import EXACT
from corolla.aggregation.sketch import basis, exact_widths, missing
from corolla.client.protocol import Order, unpack_metrics
from corolla.client.secure.plan import Products, SumPlan
from corolla.client.secure.protocol import TRAIN, Receipt
from corolla.server.secure import SecureSumFailed, SecureSums, SumSettings
from corolla.server.strategy import FederatedLoRA
from corolla.server.validation import LARGEST_CHANGE, Rejected

SUM = "sum"
"""The name of the update that stands for all clients together."""


class SecureFederatedLoRA(FederatedLoRA):
    """`FederatedLoRA` on secure sums: before training keys and shares go round, then come Y and X under masks.

    Of the methods those of whose outcome Σ p_k ΔW_k is all. There are no replies to look at: checks of their content,
    the noise report and kept replies are not to be had. Raises ValueError for what does not go with it.
    """

    def __init__(self, *args: Any, sums: SumSettings = SumSettings(), **options: Any) -> None:
        super().__init__(*args, **options)
        self.method.require_of_the_sum()
        if self.noise:
            raise ValueError("a secure sum shows no reply that noise could be measured on, got noise: leave it out")
        self.settings = sums
        self._sums: SecureSums | None = None
        self._plan: SumPlan | None = None
        self._orders: dict[str, Order] = {}
        self._failed = ""
        self._errors: dict[str, float] = {}
        self._facts: dict[str, Any] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The round's orders, with the plan of the sum and the shares for each client, to those that shared theirs."""
        messages = super().configure_train(server_round, arrays, config, grid)
        asked = {message.metadata.group_id.partition(":")[2]: message for message in messages}
        self._orders = dict(self._round.orders)
        self._sums = SecureSums(grid, self.fleet, self.run_id, self._round.number, self.settings)
        self._failed, self._plan, self._errors = "", None, {}
        try:
            sealed = self._sums.agree(asked)
        except SecureSumFailed as error:
            self._failed = str(error)
            return []
        plan = self._make_plan(sealed)
        if (size := max(plan.sizes()) * plan.bits / 8) > self.largest_message * 2**30:
            self._failed = (
                f"a message must have at most run.largest_message = {self.largest_message:g} GiB, got masked sketches "
                f"of {size / 2**30:.2f} GiB: set secure.sketch to a smaller number, or secure.bits = 32"
            )
            return []
        self._plan = plan
        told = ConfigRecord({"plan": plan.to_json()})
        return [self._secure(asked[client], told, shares) for client, shares in sealed.items()]

    def _secure(self, message: Message, told: ConfigRecord, sealed: Mapping[str, bytes]) -> Message:
        content = message.content
        content["secure"], content["sealed"] = told, ConfigRecord({**sealed})
        data = message.metadata
        return Message(content, dst_node_id=data.dst_node_id, message_type=TRAIN, group_id=data.group_id, ttl=data.ttl)

    def _make_plan(self, clients: Iterable[str]) -> SumPlan:
        """The modules of these clients. A change L_k − S_k has the components of both."""
        start, ranks, heads = self._model().start, self._ranks(), self._heads()
        shapes: dict[str, tuple[int, int]] = {}
        sums: dict[str, int] = {}
        clients = sorted(clients)
        for client in clients:
            for module, shape in self.fleet.clients[client].shapes.items():
                begun = min(ranks[client], start[module].rank) if module in start else 0
                shapes[module] = shape
                sums[module] = sums.get(module, 0) + ranks[client] + begun
        widths = exact_widths(shapes, sums)
        if width := self.settings.sketch:
            widths = {module: min(width, most) for module, most in widths.items()}
        whole = {m: shape for c in clients for m, shape in self.fleet.clients[c].heads.items() if m in heads}
        number, clip, bits = self._round.number, self.settings.clip, self.settings.bits
        return SumPlan(shapes, widths, whole, self.seed, number, self.weights, bits, clip, len(self._orders))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round's outcome from the two sums; (None, None), and the model as it was, where there is no sum."""
        updates: list[ClientUpdate] = []
        if self._sums and self._plan:
            try:
                updates = [self._sum(self._sums, self._plan, replies)]
            except SecureSumFailed as error:
                self._failed = str(error)
        elif not self._failed:
            raise RuntimeError("a round is opened by configure_train before its replies are aggregated")
        quarantined = dict(self._sums.lost) if self._sums else {}
        facts: dict[str, Any] = {}
        if self._failed and self._sums:
            self._sums.end()
            facts["failed"] = self._failed
        if updates and self._sums:
            quarantined = {c: why for c, why in quarantined.items() if c not in self._sums.survivors}
            facts["secure"] = self._facts
        return self._close(updates, self._failed, quarantined, {}, facts)

    def _sum(self, sums: SecureSums, plan: SumPlan, replies: Iterable[Message]) -> ClientUpdate:
        """S + Q X / Σ n of every module, and the heads' mean, as the update of one client that stands for all."""
        size = plan.sizes()[0]

        def read(client: str, content: Any) -> tuple[Tensor, dict[str, float]]:
            self._check(client, Receipt.unpack(content))
            return sums.vector(client, content, size, plan), unpack_metrics(content)

        group = [client for client in self._orders if client not in sums.lost]
        found = sums.read(replies, group, read)
        for client in group:
            if client not in found:
                sums.lose(client, f"no reply within {self.deadline:g} s")
        for client, (_, metrics) in found.items():
            told = {"num_examples": self.fleet.clients[client].num_examples}
            self._round.clients[client] = {**metrics, **self._round.clients[client], **told}
        sketches = plan.sketches(sums.first({client: vector for client, (vector, _) in found.items()}, plan))
        bases = {module: basis(sketch) for module, sketch in sketches.items()}
        products = plan.products(sums.second(bases, plan))
        if not products.weight > 0:
            raise SecureSumFailed(f"the clients' weights must have a sum above 0, got {products.weight:g}")
        lost = sum(missing(products.probes[module], q) ** 2 for module, q in bases.items()) ** 0.5
        self._note(sums, plan, lost, products.weight)
        self._require_exact(sums, lost, products)
        tops = {module: DenseDelta(head / products.weight) for module, head in products.heads.items()}
        count = max(round(products.weight), 1)
        return ClientUpdate(SUM, count, {**self._adapter(bases, products), **tops}, {}, count)

    def _require_exact(self, sums: SecureSums, lost: float, products: Products) -> None:
        """Raises SecureSumFailed where an exact sketch was asked for and lost clients have made it none."""
        size = sum(float(torch.linalg.norm(x)) ** 2 for x in products.x.values()) ** 0.5
        if self.settings.sketch is None and sums.survivors != sums.summed and lost > EXACT * size:
            gone = ", ".join(sorted(set(sums.summed) - set(sums.survivors)))
            raise SecureSumFailed(
                f"the sketch must span the sum, got {lost / size:.1e} of it outside, since {gone} were lost between "
                "the passes: set secure.sketch to a number to accept that"
            )

    def _check(self, client: str, receipt: Receipt) -> None:
        order = self._orders[client]
        wanted = Receipt(client, order.round, order.model, order.base_hash)
        if receipt != wanted:
            raise Rejected(f"the reply must be to {wanted}, got {receipt}")

    def _adapter(self, bases: Mapping[str, Tensor], products: Products) -> dict[str, Delta]:
        """S + Q X / Σ n by module."""
        start = self._model().start
        adapter: dict[str, Delta] = {}
        for module, q in bases.items():
            change = LowRankDelta(products.x[module] / products.weight, q)
            if not (torch.isfinite(change.A).all() and float(change.A.norm()) <= LARGEST_CHANGE):
                raise SecureSumFailed(f"the sum of {module} must be finite and at most {LARGEST_CHANGE:g}")
            adapter[module] = add([start[module].double(), change]) if module in start else change
        return adapter

    def _note(self, sums: SecureSums, plan: SumPlan, lost: float, total: float) -> None:
        """Puts what the record says of the sum where the round's end finds it."""
        entries = sum(plan.columns(module) * shape[1] for module, shape in plan.shapes.items())
        entries += sum(out * inn for out, inn in plan.heads.values())
        rounded = plan.numbers.error(entries, len(sums.survivors))
        self._errors = {"sketch_error": lost / total, "quantisation_error": rounded / total}
        self._facts = {
            "clients": list(sums.survivors),
            "lost_between": sorted(set(sums.summed) - set(sums.survivors)),
            "threshold": sums.threshold,
            "step": plan.numbers.step,
            "width": max(plan.widths.values(), default=0),
            "weight": total,
            **self._errors,
        }
        for client, count in sums.bytes_up.items():
            self._round.clients[client]["bytes_up"] = count
            self._round.clients[client]["bytes_down"] += sums.bytes_down.get(client, 0)

    def _proof(self, proof: Certificate, size: float) -> Certificate:
        """The certificate of a method that took the sum for exact, with the sum's own error added.

        Q spans the sum up to what the probes estimate, and X is off by the rounding of its terms.
        """
        error = self._errors["sketch_error"] + self._errors["quantisation_error"]
        scale = proof.error / proof.relative_error if proof.relative_error else size
        relative = (proof.error + error) / scale if scale else error
        width = self.settings.sketch or "exact"
        reason = f"{proof.reason}; a secure sum, sketch {width}, off by {error:.1e}"
        exact = proof.exact and relative <= EXACT
        return replace(proof, exact=exact, error=proof.error + error, relative_error=relative, reason=reason)
