"""Server optimizers against dense steps, and where they are refused."""

import pytest
import torch

from corolla.aggregation import AGGREGATORS, ClientUpdate, GlobalModel, advance, build_method, whole
from corolla.aggregation.optimizers import with_optimizer
from tests.aggregation import references
from tests.aggregation.federations import SHAPES, dense, difference, modules_for, play, random_delta, ranks_for

SETS = [("q", "v"), ("q",), ("q", "v")]


def rounds(name, optimizer, **options):
    method = with_optimizer(build_method(name), optimizer, **options)
    return list(play(method, ranks_for(name, (5, 3, 2)), modules_for(name, SETS), (3, 2, 1), 3, 0.3))


def inner_change(name, found):
    """Δ of the method itself on the round's replies, dense."""
    outcome = build_method(name).aggregate(found.updates, found.weights, found.before)
    merge, start, before = (dense(a, SHAPES) for a in (outcome.merge, outcome.start, found.before.start))
    return {m: merge[m] + start[m] - before[m] for m in SHAPES}


def moved(found):
    before, after = dense(whole(found.before), SHAPES), dense(whole(found.after), SHAPES)
    return {m: after[m] - before[m] for m in SHAPES}


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_fedavgm_is_the_dense_step(name):
    velocity = {}
    for found in rounds(name, "fedavgm", momentum=0.7, learning_rate=0.5):
        step, velocity = references.momentum_step(inner_change(name, found), velocity, 0.7, 0.5)
        assert difference(moved(found), step) < 1e-5 * (1 + sum(float(v.norm()) for v in step.values()))
        assert "FedAvgM" in found.outcome.certificate.reason


@pytest.mark.parametrize("name", ["flora", "warm", "zero-padding", "full"])
def test_module_adam_is_the_dense_step_with_one_scalar_a_module(name):
    m, v = {}, {}
    for found in rounds(name, "module-adam", learning_rate=0.1, tau=0.01):
        step, m, v = references.module_adam_step(inner_change(name, found), m, v, 0.9, 0.99, 0.01, 0.1)
        assert difference(moved(found), step) < 1e-5 * (1 + sum(float(x.norm()) for x in step.values()))


def test_fedadam_steps_entry_by_entry_on_the_b_of_ffa():
    m, v = {}, {}
    for found in rounds("ffa", "fedadam", learning_rate=0.1):
        outcome = build_method("ffa").aggregate(found.updates, found.weights, found.before)
        change = {n: outcome.start[n].B.double() - found.before.start[n].B.double() for n in SHAPES}
        step, m, v = references.elementwise_adam_step(change, m, v, 0.9, 0.99, 1e-3, 0.1)
        for n in SHAPES:
            assert torch.allclose(
                found.after.start[n].B.double() - found.before.start[n].B.double(), step[n], rtol=1e-4, atol=1e-6
            )
            assert torch.equal(found.after.start[n].A, found.before.start[n].A)


def test_a_truncated_velocity_is_reported():
    *_, last = rounds("flora", "fedavgm", max_rank=2)
    assert max(t.shape[0] for k, t in last.after.method_state.items() if k.endswith("/A")) == 2
    assert "lost 0" not in last.outcome.certificate.reason
    assert not last.outcome.certificate.exact


def test_a_module_that_rests_for_a_round_keeps_its_memory():
    method = with_optimizer(build_method("flora"), "module-adam", learning_rate=0.1)
    model = GlobalModel()
    for module in ("q", "v", "q"):
        update = ClientUpdate("a", 1, {module: random_delta(*SHAPES[module], 2, 1)})
        model, _ = advance(model, method.aggregate([update], {"a": 1.0}, model))
        assert f"square/{module}" in model.method_state
    assert {key for key in model.method_state if key.startswith("square/")} == {"square/q", "square/v"}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="needs a B whose meaning lasts over rounds, got flora: use ffa"):
        with_optimizer(build_method("flora"), "fedadam")
    with pytest.raises(ValueError, match="rolora"):
        with_optimizer(build_method("rolora"), "fedadam")
    with pytest.raises(ValueError, match=r"none, fedadam, fedavgm, module-adam, got 'adam'"):
        with_optimizer(build_method("flora"), "adam")
    with pytest.raises(ValueError, match=r"beta2 = 0\.9: leave it out"):
        with_optimizer(build_method("flora"), "fedavgm", beta2=0.9)
    with pytest.raises(ValueError, match="momentum needs a server optimizer"):
        with_optimizer(build_method("flora"), "none", momentum=0.9)
    with pytest.raises(ValueError, match=r"flora has no options, got energy"):
        build_method("flora", energy=0.9)
    with pytest.raises(ValueError, match=r"florist has energy, got penalty"):
        build_method("florist", penalty=0.9)
