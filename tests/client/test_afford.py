"""Out of memory: half the micro-batch, then half the rank, and the run goes on and says so."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.aggregation import FreshRows, distance, fill_adapter
from corolla.client.afford import Limits, is_out_of_memory
from corolla.client.app import app
from corolla.simulations.grid import InProcessGrid
from corolla.simulations.simulate import clients_of, nodes
from tests.client.test_options import first_order
from tests.simulations.federation import tiny_config


@given(st.integers(1, 24), st.integers(1, 5), st.integers(1, 64))
def test_halving_keeps_the_batch_of_a_step_and_ends(micro, accumulation, rank):
    limits: Limits | None = Limits(micro, accumulation, rank)
    seen = []
    while limits:
        assert limits.micro_batch * limits.accumulation == micro * accumulation
        seen.append(limits)
        limits = limits.halved()
    assert (seen[-1].micro_batch, seen[-1].rank) == (1, 1)
    assert len(seen) <= 12
    assert all(b.micro_batch <= a.micro_batch / 2 or b.rank <= a.rank / 2 for a, b in pairwise(seen))
    for known in seen:
        assert seen[0].within(known) == known


@pytest.fixture
def small_machine(tiny):
    """A machine that holds two examples, and six while a LoRA of rank 2 or less is trained."""

    def refuse(module, args, kwargs):
        rank = max((p.shape[0] for n, p in module.named_parameters() if "lora_A.local" in n), default=0)
        if module.training and kwargs["input_ids"].shape[0] * max(1, rank) > small_machine.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = tiny.model.register_forward_pre_hook(refuse, with_kwargs=True)
    yield small_machine
    handle.remove()


def one_client(tiny_folder, tmp_path, **sections):
    sections = {"train": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}} | sections
    return clients_of(tiny_config(tiny_folder, tmp_path, **sections))["client-000"]  # rank 6


def test_a_smaller_micro_batch_trains_the_same_and_is_named_in_the_metrics(tiny_folder, tmp_path, small_machine):
    client = one_client(tiny_folder, tmp_path)
    small_machine.limit = 10**6
    whole = client.train(first_order(client))
    small_machine.limit = 12
    reply = client.train(first_order(client))
    wanted = {"micro_batch": 2, "accumulation": 2, "trained_rank": 6, "out_of_memory": 1}
    assert {name: reply.metrics[name] for name in wanted} == wanted
    assert distance(reply.adapter, whole.adapter) < 1e-4 * distance(whole.adapter, {})
    assert whole.metrics["out_of_memory"] == 0
    assert reply.processed == whole.processed


def test_a_smaller_rank_leaves_the_other_components_where_they_were(tiny_folder, tmp_path, small_machine):
    client = one_client(tiny_folder, tmp_path)
    small_machine.limit = 3
    reply = client.train(first_order(client))
    assert (reply.metrics["trained_rank"], reply.metrics["micro_batch"], reply.metrics["out_of_memory"]) == (3, 1, 3)
    start = fill_adapter({}, client.hello().shapes, 6, FreshRows(0, 1))
    for module, delta in reply.adapter.items():
        assert delta.rank == 6
        assert (delta.after(3).A == start[module].after(3).A).all()
        assert not delta.after(3).B.any()
        assert delta.first(3).B.any()
    alone = one_client(tiny_folder, tmp_path, clients={"ranks": 3})
    expected = replace(alone, limits=Limits(1, 4, 3)).train(first_order(alone))
    assert distance(reply.adapter, expected.adapter) < 1e-5


def test_components_that_are_not_trained_act_all_the_same(tiny_folder, tmp_path):
    """With a start that is not zero: what training sees before its first step is the whole of it."""
    from tests.adapters.test_lora import random_adapter

    client = one_client(tiny_folder, tmp_path)
    order = first_order(client)
    order = replace(order, start=random_adapter(client.hello().shapes, 6, size=0.3))
    whole, part = (replace(client, limits=Limits(1, 4, rank)).train(order) for rank in (6, 2))
    assert part.metrics["loss_before"] == pytest.approx(whole.metrics["loss_before"], rel=1e-5)
    assert all((part.adapter[m].after(2).B == d.after(2).B).all() for m, d in order.start.items())


def test_when_nothing_is_left_to_give_up_the_client_says_what_it_tried(tiny_folder, tmp_path, small_machine):
    client = one_client(tiny_folder, tmp_path)
    small_machine.limit = 0
    with pytest.raises(RuntimeError, match=r"micro-batch 1 and rank 1, got CUDA out of memory.*checkpointing"):
        client.train(first_order(client))


def test_other_errors_are_not_taken_for_want_of_memory(tiny_folder, tmp_path):
    client = one_client(tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="the order is for the base"):
        client.train(first_order(client, base_hash="another"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


def test_a_node_remembers_what_its_memory_allowed(tiny_folder, tmp_path, small_machine):
    from corolla.server.strategy import FederatedLoRA

    config = tiny_config(tiny_folder, tmp_path, run={"rounds": 2}, clients={"count": 1, "ranks": 6})
    small_machine.limit = 12
    records = []
    strategy = FederatedLoRA(
        settings=config.settings().model_dump_json(),
        evaluate="never",
        on_round=lambda record, *rest: records.append(record),
    )
    strategy.run(InProcessGrid(app, nodes(config), config.flat()), 2)
    seen = [record.clients["client-000"] for record in records]
    assert [(s["out_of_memory"], s["micro_batch"]) for s in seen] == [(1, 2), (0, 2)]
