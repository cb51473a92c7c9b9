"""Options of local training: each does what it says, and the ones that only save memory or time change nothing."""

import re

import pytest
import torch

from corolla.adapters import AdapterSpec, attached, dense_beside, open_base, proximal_penalty, read_adapter
from corolla.adapters.base import QUANTIZATIONS
from corolla.aggregation import DenseDelta, FreshRows, adapter_norm, distance, fill_adapter
from corolla.client.config import TrainConfig
from corolla.client.tasks.packing import pack
from corolla.client.training import train_round
from corolla.server.config import Config, ConfigError
from tests.adapters.test_lora import random_adapter, state_of
from tests.client.test_training import SPEC, examples, train


def start_of(base, rank=4):
    from corolla.adapters import target_shapes

    return fill_adapter({}, target_shapes(base.model, SPEC), rank, FreshRows(0))


def moved(adapter, start):
    """‖after − before‖, in weight space."""
    return distance(adapter, start)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpointing": True},
        {"batching": "padding-free"},
        {"compile": "aot_eager"},
        {"batch_size": 2, "accumulation": 2},
        {"batch_size": 1, "accumulation": 4},
    ],
    ids=str,
)
def test_what_saves_memory_or_time_trains_the_same(tiny, change):
    rows, start, before = examples(tiny, 8), start_of(tiny), state_of(tiny.model)
    plain = {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    expected, _ = train(tiny, TrainConfig(**plain), rows)
    found, metrics = train(tiny, TrainConfig(**(plain | change)), rows)
    assert moved(expected, start) > 0.01
    assert distance(found, expected) < 1e-3 * moved(expected, start)
    assert metrics["steps"] == 2
    assert not tiny.model.is_activation_checkpointing
    assert not tiny.model.get_input_embeddings()._forward_hooks
    assert all((a == b).all() for a, b in zip(before.values(), state_of(tiny.model).values(), strict=True))


def test_packed_rows_hold_every_example_once_and_train_as_if_they_were_apart(tiny):
    rows = examples(tiny, 9)
    longest = max(row.length for row in rows)
    packed = pack(rows, 3 * longest)
    assert sorted(n for row in packed for n in row.lengths) == sorted(row.length for row in rows)
    assert all(row.length <= 3 * longest and row.length == sum(row.lengths) for row in packed)
    assert sum(row.count for row in packed) == 9
    assert sum(row.learned for row in packed) == sum(row.learned for row in rows)
    apart = {row.input_ids: row for row in rows}
    order = []
    for row in packed:
        first = 0
        for length in row.lengths:
            order.append(apart[row.input_ids[first : first + length]])
            first += length
    config = {"learning_rate": 1e-2, "local_steps": 1}
    expected, _ = train(tiny, TrainConfig(**config, batch_size=9), order)
    found, metrics = train(tiny, TrainConfig(**config, batch_size=len(packed), batching="packed"), packed)
    assert distance(found, expected) < 1e-3 * moved(expected, start_of(tiny))
    assert metrics["tokens"] == sum(row.length for row in rows)
    with pytest.raises(ValueError, match=f"longest example, got {longest} tokens for rows of {longest - 1}"):
        pack(rows, longest - 1)


def test_bfloat16_autocast_keeps_factors_in_float32(tiny):
    rows, start = examples(tiny, 8), start_of(tiny)
    config = {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    expected, _ = train(tiny, TrainConfig(**config), rows)
    found, _ = train(tiny, TrainConfig(**config, dtype="bfloat16"), rows)
    assert 1e-6 < distance(found, expected) / moved(expected, start) < 0.3
    values = torch.cat([delta.B.flatten() for delta in found.values()])
    assert (values != values.bfloat16().float()).float().mean() > 0.5  # they are no rounded numbers


@pytest.mark.parametrize("kind", sorted(set(QUANTIZATIONS) - {"none"}))
def test_on_a_quantised_base_a_change_of_1e_4_survives(tiny_folder, kind):
    """SFTTrainer takes such factors to bfloat16, whose numbers are 0.4 % apart, before the optimizer is built."""
    pytest.importorskip("bitsandbytes")
    base = open_base(str(tiny_folder), device="cpu", quantization=kind)
    start = {m: type(d)(d.A, torch.full_like(d.B, 0.01)) for m, d in start_of(base).items()}
    config = TrainConfig(local_steps=1, batch_size=4, learning_rate=1e-6)  # Adam's first step is the learning rate
    with attached(base.model, SPEC, start, random_adapter({m: d.shape for m, d in start.items()}, 3)) as model:
        train_round(model, base, config, examples(base, 4), 1, 1, 0)
        found = read_adapter(model)
    change = torch.cat([(found[m].B - start[m].B).abs().flatten() for m in start]) / 0.01
    assert 0.5e-4 < change.median() / SPEC.scaling < 2e-4


def test_the_proximal_term_is_that_of_the_dense_change_of_adapters_and_heads(tiny):
    shapes = {m: d.shape for m, d in start_of(tiny).items()}
    begin, end = random_adapter(shapes, 4, seed=1), random_adapter(shapes, 4, seed=2)
    head = {"lm_head": DenseDelta(torch.zeros(264, 32))}
    with attached(tiny.model, SPEC, begin) as model, dense_beside(tiny.model, head, "local", trains=True):
        penalty = proximal_penalty(model, 0.6)
        assert penalty(model).item() == 0.0
        from corolla.adapters import write_adapter

        write_adapter(model, end)
        tiny.model.get_submodule("lm_head")._parameters["corolla_delta_local"].data.fill_(0.1)
        value = penalty(model)
        value.backward()
        gradients = [p.grad for n, p in model.named_parameters() if ".local." in n and p.requires_grad]
    expected = 0.3 * (distance(begin, end) ** 2 + 264 * 32 * 0.01)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_proximal_term_holds_a_client_back(tiny_folder, tmp_path):
    from corolla.simulations.simulate import clients_of
    from tests.simulations.federation import tiny_config

    norms = []
    for strength in (0.0, 0.1, 10.0):
        config = tiny_config(tiny_folder, tmp_path, train={"local_steps": 6, "proximal": strength})
        client = clients_of(config)["client-000"]
        norms.append(adapter_norm(client.train(first_order(client)).adapter))
    assert norms[0] > 1.05 * norms[1] > 1.05**2 * norms[2]


def first_order(client, round_number=1, **changes):
    from corolla.aggregation import GlobalModel, build_method, share
    from corolla.client.protocol import Assignment, Order, share_digest

    rule = build_method("flora").constrain(round_number)
    part = share(GlobalModel(), rule, client.rank, client.hello().shapes)
    values = {"round": round_number, "rank": client.rank, "trains": "AB", "fresh_round": round_number, "seed": 0}
    values |= {"model": "m", "share": share_digest(part.frozen, part.start), "base_hash": client.base.hash}
    return Assignment(Order(**(values | changes)), part.frozen, part.start)


def test_kept_moments_make_two_rounds_one_training(tiny):
    """Two steps, and two more with the optimizer's moments, are four steps; without the moments they are not."""
    rows, start = examples(tiny, 16), start_of(tiny)
    config = TrainConfig(local_steps=2, batch_size=4, learning_rate=1e-2)
    ends = {}
    for kept in (True, False):
        adapter, moments = start, {}
        for number in (1, 2):
            with attached(tiny.model, SPEC, adapter) as model:
                given = moments if kept else {}
                train_round(model, tiny, config, rows[8 * number - 8 : 8 * number], number, 2, 0, moments=given)
                adapter, moments = read_adapter(model), given
        ends[kept] = adapter
        assert {name.rpartition("/")[2] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
    whole, _ = train(tiny, config.model_copy(update={"local_steps": 4}), rows)
    assert distance(ends[True], whole) < 1e-4 * moved(whole, start)
    assert distance(ends[False], whole) > 1e-2 * moved(whole, start)


def test_moments_that_no_longer_fit_are_left_out(tiny):
    moments: dict = {}
    rows, config = examples(tiny, 4), TrainConfig(local_steps=1, batch_size=4)
    with attached(tiny.model, SPEC, start_of(tiny)) as model:
        train_round(model, tiny, config, rows, 1, 2, 0, moments=moments)
    narrow = AdapterSpec(2, 4.0, "all-linear")
    with attached(tiny.model, narrow, start_of(tiny, 2)) as model:
        train_round(model, tiny, config, rows, 2, 2, 0, moments=moments)
    assert {t.shape[0] for name, t in moments.items() if "lora_A" in name and t.ndim} == {2}


def test_an_optimizer_whose_memory_is_no_tensor_of_the_parameter_is_refused(tiny):
    config = TrainConfig(local_steps=1, batch_size=4, optimizer="adafactor")
    with attached(tiny.model, SPEC, start_of(tiny)) as model, pytest.raises(ValueError, match="use adamw_torch"):
        train_round(model, tiny, config, examples(tiny, 4), 1, 1, 0, moments={})


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "rmsprop", "adamw_torch_fused"])
def test_optimizers_by_transformers_name(tiny, optimizer):
    config = TrainConfig(local_steps=2, batch_size=4, learning_rate=1e-2, optimizer=optimizer)
    found, _ = train(tiny, config, examples(tiny, 8))
    assert moved(found, start_of(tiny)) > 1e-4


def test_half_precision_needs_a_gpu(tiny):
    with pytest.raises(ValueError, match="'float16' needs a GPU, got the CPU: use 'bfloat16'"):
        train(tiny, TrainConfig(local_steps=1, dtype="float16"), examples(tiny, 4))


REFUSED = [
    ({"train.optimizer": "adamm"}, "train.optimizer: must be one of adamw_torch"),
    ({"train.batching": "packed", "train.task": "preference"}, "train.batching must be one of padded"),
    ({"train.keep_optimizer": True}, "train.keep_optimizer needs components that last .* got .* 'flora'"),
    ({"train.keep_optimizer": True, "aggregation.method": "warm"}, "got aggregation.method = 'warm'"),
    ({"adapter.personal_rank": 2, "aggregation.method": "full"}, "'full' has no adapters"),
    ({"train.task": "preference", "aggregation.method": "full"}, "measures against the base as it is"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_work_is_refused_before_anything_runs(settings, message):
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(Config().flat() | settings)
    assert re.search(message, str(caught.value))
