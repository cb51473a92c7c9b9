"""What federation is worth: base, each client alone, and the global model, on everybody's held-out examples."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from corolla.adapters import HOSTED, Hosted, carrying
from corolla.aggregation import (
    AdapterState,
    Budget,
    ClientUpdate,
    GlobalModel,
    Method,
    advance,
    aggregate_round,
    build_method,
    share,
    whole,
    with_offset,
)
from corolla.client.local import Client
from corolla.client.protocol import Assignment, Order, share_digest
from corolla.server.folder import RunFolder
from corolla.server.scores import LOSS, OLD_SCORE, score_of, title

BASE, GLOBAL = "base", "global"

EVERY = "all"
"""The row of examples that belong to no group."""


@dataclass(frozen=True)
class Comparison:
    """`metric` by column (base, each client alone, global) and by group of held-out examples.

    The metric is the task's score (0..1), or the loss where the examples have no score.
    """

    columns: Mapping[str, Mapping[str, float]]
    metric: str = OLD_SCORE

    @property
    def groups(self) -> list[str]:
        """The groups, sorted."""
        return sorted({group for column in self.columns.values() for group in column})

    def average(self, column: str) -> float:
        """The mean over all groups that the column has."""
        values = self.columns[column].values()
        return sum(values) / len(values)

    @property
    def is_score(self) -> bool:
        """Whether the metric is a score rather than a loss."""
        return self.metric != LOSS

    @property
    def title(self) -> str:
        """The metric in words."""
        return title(self.metric).capitalize()


def compare(
    folder: RunFolder, clients: Mapping[str, Client], on_step: Callable[[str], None] = lambda what: None
) -> Comparison:
    """The run's first and last evaluation beside each client alone.

    The evaluations give base and global as the clients found them, each on its own held-out examples; a client that
    is alone is evaluated on those of all. Raises ValueError for a run without both evaluations.
    """
    lines = folder.lines()
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if len(evaluations) < 2:
        raise ValueError(
            "a comparison needs the evaluations before round one and after the last: set run.evaluate = 'ends'"
        )
    metric = compared(lines)
    columns = {BASE: by_group(evaluations[0]["clients"].values(), metric)}
    held_out = [example for client in clients.values() for example in client.data.held_out]
    for client_id, client in clients.items():
        model = train_alone(client, folder, lines, on_step)
        with carrying(client.base.model, client.on_weights(whole(model))) as alone:
            found = client.task.evaluate(alone, client.base, held_out, client.settings.data)
        columns[client_id] = by_group([found], metric)
        on_step("evaluate")
    return Comparison(columns | {GLOBAL: by_group(evaluations[-1]["clients"].values(), metric)}, metric)


def compared(lines: list[dict[str, Any]]) -> str:
    """What a run is compared by: its score, or the loss where it has none."""
    return score_of(lines) or LOSS


def by_group(evaluations: Iterable[Mapping[str, float]], metric: str) -> dict[str, float]:
    """`metric` by group over the evaluations that have it, each weighted by its examples of that group."""
    hits: dict[str, float] = {}
    counts: dict[str, float] = {}
    for metrics in evaluations:
        groups = [name.partition("/")[2] for name in metrics if name.startswith(f"{metric}/")]
        for group in groups or ([EVERY] if metric in metrics else []):
            suffix = f"/{group}" if groups else ""
            count = metrics[f"examples{suffix}"]
            hits[group] = hits.get(group, 0.0) + count * metrics[f"{metric}{suffix}"]
            counts[group] = counts.get(group, 0.0) + count
    return {group: hits[group] / counts[group] for group in sorted(counts)}


def train_alone(
    client: Client, folder: RunFolder, lines: list[dict[str, Any]], on_step: Callable[[str], None]
) -> GlobalModel:
    """The client as a federation of one: the same rounds, steps, examples and seeds as it had in the run.

    Its first round begins where the run's first round began, so the reply that the run kept of it (run.keep_replies)
    is taken instead of training it again.
    """
    method, model = method_alone(client), first_model(client)
    for line in lines:
        if (
            line["kind"] != "round"
            or client.client_id not in line["clients"]
            or client.client_id in line["quarantined"]
        ):
            continue
        reply = folder.load_replies(line["round"]).get(client.client_id) if line["round"] == 1 else None
        if reply is None or folder.config().aggregation.method != "flora" or folder.config().adapter.init_from:
            reply = train_once(client, model, line["round"])
            on_step("train")
        update = ClientUpdate(client.client_id, 1, reply)
        outcome = aggregate_round(method, [update], {client.client_id: 1.0}, model, set(client.hello().heads))
        model, _ = advance(model, outcome, Budget())
    return model


def method_alone(client: Client) -> Method:
    """FLoRA, begun where the client's kind of adapter begins."""
    hosted = HOSTED.get(client.settings.adapter.kind)
    method = build_method("flora")
    return with_offset(method, hosted.name) if hosted and hosted.begins else method


def first_model(client: Client) -> GlobalModel:
    """The model before the first round of the client alone."""
    hosted, hello = HOSTED.get(client.settings.adapter.kind, Hosted()), client.hello()
    begin = partial(hosted.start, client.base.model)
    return method_alone(client).initial(hello.shapes, hello.rank, client.settings.seed, begin)


def train_once(client: Client, model: GlobalModel, round_number: int) -> AdapterState:
    """The adapter that the client replies when it is ordered to train one beside `model`, as FLoRA does."""
    rule, hello = method_alone(client).constrain(round_number), client.hello()
    part = share(model, rule, hello.rank, hello.shapes)
    order = Order(
        round=round_number,
        rank=hello.rank,
        trains="".join(sorted(client.travels.trains if client.travels else rule.trains)),
        fresh_round=round_number if rule.fresh_per_round else 0,
        seed=client.settings.seed,
        model=model.digest(),
        share=share_digest(part.frozen, part.start),
        base_hash=client.base.hash,
    )
    return client.train(Assignment(order, part.frozen, part.start)).adapter
