"""Kinds that are LoRA but in training: forward and gradients against direct implementations on one layer."""

import pytest
import torch
from torch import nn

from corolla.adapters import HOSTED, LOCAL, AdapterSpec, attached, is_lora, read_adapter
from corolla.adapters.kinds import allora, dylora, sora
from corolla.adapters.kinds.dylora import drawn_rank
from corolla.adapters.kinds.hosted import local_layers, without_zeros
from corolla.adapters.kinds.sora import GATE, close_gates
from corolla.aggregation import LowRankDelta, distance, zeros

RANK, OUT, IN = 4, 7, 6


class Net(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = random(OUT, IN, seed=0)

    def forward(self, x):
        return self.layer(x)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(kind, **options):
    return HOSTED[kind].adjust(AdapterSpec(RANK, 2.0 * RANK, ("layer",), kind=kind, **options))


START = LowRankDelta(random(RANK, IN, seed=1), random(OUT, RANK, seed=2))
X, TARGET = random(3, IN, seed=3), random(3, OUT, seed=4)


class Layer:
    """The layer with a kind around it, and its live parts. `step` is forward and backward."""

    def __init__(self, net, model, training):
        self.net, self.model, self.training = net, model, training
        self.lora = local_layers(model)["layer"]
        self.a, self.b = self.lora.lora_A[LOCAL].weight, self.lora.lora_B[LOCAL].weight
        self.s = self.lora.scaling[LOCAL]

    def step(self, x=X):
        self.model.zero_grad()
        out = self.model(x)
        (out * TARGET).sum().backward()
        return out.detach()


def around(kind, work, seed=0, trains="AB", **options):
    """What `work(layer)` returns inside; afterwards everything must be off again."""
    net, spec = Net(), spec_of(kind, **options)
    before = net.layer.weight.clone()
    with attached(net, spec, {"layer": START}, trains=trains) as model:
        plain = {name: set(module.__dict__) for name, module in model.named_modules()}
        parameters = [name for name, _ in model.named_parameters()]
        with HOSTED[kind].around(model, spec, seed, trains) as training:
            found = work(Layer(net, model.train(), training))
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == plain
        assert [name for name, _ in model.named_parameters()] == parameters
        assert not any(module._forward_hooks for module in model.modules())
        model.eval()
        bare = model(X)
        assert torch.allclose(bare, X @ (before + read_adapter(model)["layer"].dense()).T, atol=1e-5)
    assert torch.equal(net.layer.weight, before)
    return found


@pytest.mark.parametrize("kind", HOSTED)
def test_a_kind_is_taken_off_again_and_computes_in_evaluation_what_is_read(kind):
    def work(layer):
        layer.model.eval()
        read = layer.training.fold(read_adapter(layer.model))["layer"]
        assert torch.allclose(layer.model(X), X @ (layer.net.layer.base_layer.weight + read.dense()).T, atol=1e-5)
        return layer.s

    assert around(kind, work) == {"allora": 1.0, "rslora": 4.0}.get(kind, 2.0)
    assert is_lora(kind)
    assert not is_lora("dora")


def test_a_kind_is_taken_off_where_training_fails():
    for kind in HOSTED:
        net, spec = Net(), spec_of(kind)
        with attached(net, spec, {"layer": START}) as model:
            names = [name for name, _ in model.named_parameters()]
            with pytest.raises(KeyError), HOSTED[kind].around(model, spec, 0, "AB"):
                raise KeyError
            assert [name for name, _ in model.named_parameters()] == names
            assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


# DyLoRA


class State:
    global_step = 0


def begin_step(training, step):
    state = State()
    state.global_step = step
    for callback in training.callbacks:
        callback.on_step_begin(None, state, None)


def dylora_is_a_prefix() -> float:
    """How far forward and gradients of twelve steps are from those of B[:, :b] A[:b] alone."""

    def work(layer):
        worst = 0.0
        for step in range(12):
            begin_step(layer.training, step)
            b = drawn_rank(0, step, RANK)
            out = layer.step()
            a_b, b_b = (t.detach().clone().requires_grad_() for t in (layer.a[:b], layer.b[:, :b]))
            wanted = X @ layer.net.layer.base_layer.weight.T + layer.s * X @ a_b.T @ b_b.T
            (wanted * TARGET).sum().backward()
            gaps = out - wanted, layer.a.grad[:b] - a_b.grad, layer.b.grad[:, :b] - b_b.grad
            worst = max(worst, *(float(gap.abs().max()) for gap in gaps))
            assert not layer.a.grad[b:].any()
            assert not layer.b.grad[:, b:].any()
        return worst

    return around("dylora", work)


def test_dylora_trains_a_prefix_that_it_draws_for_each_step():
    assert dylora_is_a_prefix() < 1e-4


def test_a_scaling_that_depends_on_the_drawn_rank_is_caught(monkeypatch):
    def masking(mask):
        return lambda layer, inputs, output: output * mask * (len(mask) / mask.sum()) if layer.training else output

    monkeypatch.setattr(dylora, "_masking", masking)
    assert dylora_is_a_prefix() > 0.1


def test_ranks_are_drawn_uniformly_from_seed_and_step_alone():
    drawn = [drawn_rank(5, step, 4) for step in range(400)]
    torch.manual_seed(1)
    assert drawn == [drawn_rank(5, step, 4) for step in range(400)]
    assert drawn != [drawn_rank(6, step, 4) for step in range(400)]
    assert set(drawn) == {1, 2, 3, 4}
    assert all(70 < drawn.count(rank) < 130 for rank in (1, 2, 3, 4))


# SoRA


def optimize(layer, steps=3):
    """Steps of AdamW with SoRA's callback after each, as the trainer calls it."""
    parameters = [layer.a, layer.b, layer.lora._parameters[GATE]]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    for _ in range(steps):
        layer.step()
        optimizer.step()
        for callback in layer.training.callbacks:
            callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    return layer.training.fold(read_adapter(layer.model))["layer"]


def directly(weight, s, threshold, steps=3) -> LowRankDelta:
    """SoRA as the equations say it: rows of A and columns of B normalised, their norms in g, before each threshold."""
    a, b = START.A.clone().requires_grad_(), (START.B / s).requires_grad_()
    g = torch.ones(RANK, requires_grad=True)
    optimizer = torch.optim.AdamW([a, b, g], lr=0.1, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        ((X @ weight.T + s * X @ a.T @ torch.diag(g) @ b.T) * TARGET).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for j in range(RANK):
                norms = b[:, j].norm() * a[j].norm()
                size = float(g[j] * norms)
                shrunk = max(abs(size) - 0.1 * threshold, 0.0) * (1 if size > 0 else -1)
                g[j] = shrunk / norms
    return LowRankDelta(a.detach(), (s * b @ torch.diag(g)).detach())


def sora_is_off_by(threshold=8.0) -> float:
    def work(layer):
        weight = layer.net.layer.base_layer.weight.detach()
        found, wanted = optimize(layer), directly(weight, layer.s, threshold)
        assert found.B.any()
        return distance({"m": found}, {"m": wanted}) / float(wanted.dense().norm())

    return around("sora", work, sora_threshold=threshold)


def test_sora_is_its_equations():
    assert sora_is_off_by() < 1e-5


def test_a_hard_threshold_is_caught(monkeypatch):
    monkeypatch.setattr(sora, "soft_threshold", lambda x, by: torch.where(x.abs() > by, x, 0.0))
    assert sora_is_off_by() > 1e-2


def test_the_threshold_of_the_published_code_is_caught(monkeypatch):
    right = sora.soft_threshold
    monkeypatch.setattr(sora, "soft_threshold", lambda x, by: torch.where(x.abs() > 2 * by, right(x, by), 0.0))
    gate = torch.tensor([0.12, 0.18, 0.5])
    close_gates(gate, torch.eye(3), torch.eye(3), 0.1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gate, torch.tensor([0.02, 0.08, 0.4]))


def test_the_threshold_is_soft_and_cannot_be_evaded_by_larger_factors():
    gate = torch.tensor([0.12, -0.18, 0.05, 0.5])
    a, b = torch.eye(4), torch.eye(4)
    plain = gate.clone()
    close_gates(plain, a, b, 0.1)
    torch.testing.assert_close(plain, torch.tensor([0.02, -0.08, 0.0, 0.4]))
    for grown_a, grown_b in ((1.0, 10.0), (10.0, 1.0)):
        grown = gate / 10
        close_gates(grown, grown_a * a, grown_b * b, 0.1)
        torch.testing.assert_close(10 * grown, plain)


def test_a_component_of_size_zero_keeps_its_gate():
    gate = torch.ones(2)
    close_gates(gate, torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 0.25)
    assert gate.tolist() == [1.0, 0.75]


def test_gates_are_fixed_where_b_is():
    def work(layer):
        assert GATE not in layer.lora._parameters
        return layer.training.fold(read_adapter(layer.model))["layer"]

    assert distance({"m": around("sora", work, trains="A")}, {"m": START}) < 1e-6


def test_components_of_zeros_are_dropped_but_not_the_last_one():
    delta = LowRankDelta(START.A * torch.tensor([1.0, 0, 1, 1])[:, None], START.B * torch.tensor([1.0, 1, 0, 1]))
    kept = without_zeros(delta)
    assert kept.rank == 2
    assert torch.equal(kept.dense(), delta.dense())
    assert without_zeros(zeros(3, 2, 5)).rank == 1
    assert without_zeros(zeros(3, 2, 0)).rank == 0


# ALLoRA


def allora_is_off_by(eta=3.0) -> float:
    """Forward, and the gradients of A, B and the input, against autograd on dense matrices."""

    def work(layer):
        x = X.clone().requires_grad_()
        out = layer.step(x)
        weight, a, b = layer.net.layer.base_layer.weight.detach(), layer.a.detach(), layer.b.detach()
        rates = 1 / ((b @ a).norm(dim=1) + 1 / eta**2).sqrt()
        assert float(rates.max() / rates.min()) > 1.1
        g = TARGET
        of_b = torch.stack([rates[i] * (g[:, i : i + 1] * (X @ a.T)).sum(0) for i in range(OUT)])
        of_a = b.T @ torch.diag(rates) @ g.T @ X
        of_x = g @ (weight + b @ a)
        gaps = out - X @ (weight + b @ a).T, layer.a.grad - of_a, layer.b.grad - of_b, x.grad - of_x
        return max(float(gap.abs().max()) for gap in gaps)

    return around("allora", work, allora_eta=eta)


def test_allora_is_its_equations():
    assert allora_is_off_by() < 1e-4


def test_rates_of_rows_of_b_instead_of_b_a_are_caught(monkeypatch):
    monkeypatch.setattr(allora, "row_rates", lambda a, b, eta: (b.norm(dim=1) + eta**-2).rsqrt().detach())
    assert allora_is_off_by() > 1e-2


def test_rates_in_the_gradient_of_the_input_are_caught(monkeypatch):
    def product(a, b, eta, x):
        out, rates = x @ a.weight.T @ b.weight.T, allora.row_rates(a.weight, b.weight, eta)
        out.register_hook(lambda gradient: gradient * rates)
        return out

    monkeypatch.setattr(allora, "_product", product)
    assert allora_is_off_by() > 1e-2


def test_before_anything_has_moved_the_rate_is_eta():
    assert torch.allclose(allora.row_rates(START.A, torch.zeros(OUT, RANK), 5.0), torch.full((OUT,), 5.0))


def test_allora_trains_the_factor_that_trains_alone_and_under_autocast():
    def work(layer):
        with torch.autocast("cpu", torch.bfloat16):
            layer.step()
        return layer.a.grad, layer.b.grad

    whole = around("allora", lambda layer: (layer.step(), layer.b.grad)[1])
    of_a, of_b = around("allora", work, trains="B")
    assert of_a is None
    assert of_b.dtype == torch.float32
    assert float((of_b - whole).norm() / whole.norm()) < 0.05


# PiSSA and OLoRA


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_start_is_the_leading_part_of_the_weight_and_nested(kind):
    net = Net()
    weight = net.layer.weight.detach()
    starts = {rank: HOSTED[kind].start(net, {"layer": (OUT, IN)}, rank)["layer"] for rank in (2, 4, IN)}
    assert torch.allclose(starts[IN].dense(), weight, atol=1e-5)
    assert torch.allclose(starts[4].first(2).dense(), starts[2].dense(), atol=1e-6)
    assert torch.equal(net.layer.weight, weight)
    if kind == "pissa":
        tail = torch.linalg.svdvals(weight)[2:].square().sum().sqrt()
        assert float((weight - starts[2].dense()).norm()) == pytest.approx(float(tail), rel=1e-4)
    else:  # after r steps of Gram-Schmidt the first r columns of W are met
        assert torch.allclose(starts[2].dense()[:, :2], weight[:, :2], atol=1e-5)
        assert torch.allclose(starts[2].B.T @ starts[2].B, torch.eye(2), atol=1e-5)
        assert (starts[IN].A.diagonal() >= 0).all()
