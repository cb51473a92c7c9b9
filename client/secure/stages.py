"""A client's answers in a secure sum. What it must remember between them is in the node's state, in memory alone."""

import json
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from corolla.aggregation import WEIGHTS, add_adapters, scale_adapter
from corolla.client.protocol import Assignment, Reply, pack_adapter, unpack_adapter
from corolla.client.secure.plan import SumPlan
from corolla.client.secure.protocol import BASES, MASKED, Receipt, config, pack_tensors, texts, unpack_tensor
from corolla.client.secure.session import Session, keys_of, text_of

SESSION, PLAN, CHANGE = (f"corolla.secure.{name}" for name in ("session", "plan", "change"))
"""The records of a node's state with the secrets, with what is summed, and with what was trained."""

OPENED = "corolla.secure.opened"
"""The record with the last round of a run whose sum this client helped to open; it stays."""


def publish_keys(content: RecordDict, state: RecordDict, client: str) -> RecordDict:
    """Begins a round: fresh secrets, and what was left of another round is gone.

    Raises ValueError for a round that was opened before: training is seeded, so two sums of it over different clients
    would give the difference away.
    """
    forget(state)
    asked = config(content, "secure", "run", "round")
    opened: dict[str, Any] = dict(state.config_records.get(OPENED) or {})
    if opened.get("run") == asked["run"] and int(asked["round"]) <= int(opened["round"]):
        raise ValueError(f"a round is summed once, got round {asked['round']} after round {opened['round']} was opened")
    session = Session.new(client, str(asked["run"]), int(asked["round"]))
    _remember(state, session)
    return RecordDict({"keys": ConfigRecord({"json": text_of({client: session.public()})})})


def share_secrets(content: RecordDict, state: RecordDict) -> RecordDict:
    """The shares of this client's secrets, sealed for every other client of the roster."""
    asked = config(content, "secure", "roster", "threshold")
    roster = {client: keys_of(keys) for client, keys in json.loads(asked["roster"]).items()}
    session, sealed = _session(state).share(roster, int(asked["threshold"]))
    _remember(state, session)
    return RecordDict({"sealed": ConfigRecord({**sealed})})


def train_masked(content: RecordDict, state: RecordDict, train: Callable[[Assignment], Reply]) -> RecordDict:
    """Opens the others' shares, trains, and replies Y under masks; the change stays here for the second pass."""
    plan = SumPlan.from_json(config(content, "secure", "plan")["plan"])
    opened = _session(state).open(texts(content, "sealed"))
    assignment = Assignment.unpack(content)
    if (opened.round, plan.round) != (assignment.order.round,) * 2:
        raise ValueError(
            f"keys, plan and order must be of one round, got {opened.round}, {plan.round}, {assignment.order.round}"
        )
    if plan.terms < len(opened.roster):
        raise ValueError(f"the plan must allow for {len(opened.roster)} clients, got {plan.terms}")
    reply = train(assignment)
    change = add_adapters(reply.adapter, scale_adapter(assignment.start, -1.0))
    if unknown := sorted(change.keys() - plan.shapes.keys() - plan.heads.keys()):
        raise ValueError(f"the plan must have all modules of {reply.client_id}, got none for {unknown[0]}")
    weight = float(WEIGHTS[plan.weights](reply.update()))
    vector = plan.numbers.encode(plan.first(change, weight))
    session, masked = opened.mask(vector, opened.group)
    _remember(state, session)
    state.config_records[PLAN] = ConfigRecord({"plan": plan.to_json(), "weight": weight})
    state.array_records[CHANGE] = pack_adapter(change)
    return Receipt.of(reply).pack(masked, reply.metrics)


def project_masked(content: RecordDict, state: RecordDict) -> RecordDict:
    """Replies X, the heads and the weight under the masks of the second pass."""
    session = _session(state)
    kept = config(state, PLAN, "plan", "weight")
    plan = SumPlan.from_json(kept["plan"])
    bases = {
        module: unpack_tensor(content, "bases", module, BASES, torch.float64, (shape[0], plan.columns(module)))
        for module, shape in plan.shapes.items()
    }
    change = unpack_adapter(state.array_records[CHANGE])
    vector = plan.numbers.encode(plan.second(change, bases, kept["weight"]))
    session, masked = session.mask(vector, _names(content, "group"))
    _remember(state, session)
    return RecordDict({"masked": pack_tensors({"vector": masked}, MASKED)})


def reveal_shares(content: RecordDict, state: RecordDict) -> RecordDict:
    """One share for each client of the pass; after the second pass everything is forgotten."""
    session, shares = _session(state).reveal(_names(content, "survivors"))
    _remember(state, session)
    state.config_records[OPENED] = ConfigRecord({"run": session.run, "round": session.round})
    if session.step == "revealed 2":
        forget(state)
    return RecordDict({"shares": ConfigRecord({**shares})})


def forget(state: RecordDict) -> None:
    """Takes the secrets and the change out of the node's memory."""
    for name in (SESSION, PLAN, CHANGE):
        state.pop(name, None)


def _names(content: RecordDict, key: str) -> tuple[str, ...]:
    names = config(content, "secure", key)[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} must be a list of clients, got {names!r}")
    return tuple(names)


def _session(state: RecordDict) -> Session:
    if SESSION not in state.config_records:
        raise ValueError("a secure sum begins with keys, got a step of one that this node is not in: it was restarted")
    return Session.from_json(str(state.config_records[SESSION]["json"]))


def _remember(state: RecordDict, session: Session) -> None:
    state.config_records[SESSION] = ConfigRecord({"json": session.to_json()})
