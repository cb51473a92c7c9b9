"""Convolutions: their adapters are matrices like any other, on the wire, beside a base, merged and exported."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetForImageClassification

from corolla.adapters import (
    KINDS,
    AdapterSpec,
    FolderFacts,
    attached,
    carrying,
    dense_beside,
    kind_shapes,
    on_weights,
    principal_components,
    proximal_penalty,
    read_adapter,
    read_dense,
    read_peft_facts,
    read_peft_folder,
    tail_penalty,
    target_shapes,
    train_kind,
    weight_shapes,
    write_adapter,
    write_peft_folder,
)
from corolla.adapters.carry import added, beside
from corolla.adapters.export import kernels_of, merge_into
from corolla.adapters.kinds import attach
from corolla.aggregation import (
    ClientUpdate,
    DenseDelta,
    FreshRows,
    GlobalModel,
    LowRankDelta,
    RowScaleDelta,
    add_adapters,
    advance,
    after,
    build_method,
    distance,
    fill_adapter,
    scale_adapter,
)
from corolla.simulations.laboratory import merge_adapters, read_adapters
from tests.adapters.test_lora import assert_untouched, random_adapter, state_of

SPEC = AdapterSpec(4, 8.0, ("convolution",))
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def resnet():
    """Kernels of 7, 3 and 1, with strides and padding; it must be left as it was."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(num_channels=3, layer_type="basic", num_labels=3, **sizes))
    model = model.eval().requires_grad_(False)
    before = state_of(model)
    yield model
    assert_untouched(model, before)


@torch.no_grad()
def logits(model):
    return model(IMAGES).logits


def matrix(module):
    return module.weight.detach().flatten(1)


def apart(one, other):
    return float((one - other).norm() / other.norm())


def moved(model, seed, size=0.1):
    """Every trained parameter, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def test_what_is_read_is_what_peft_computes_and_goes_back_in(resnet):
    config = LoraConfig(r=6, lora_alpha=4, rank_pattern={"embedder.convolution": 2}, target_modules=["convolution"])
    config.init_lora_weights = False
    model = get_peft_model(resnet, config)
    adapter = read_adapter(model, "default")
    assert adapter["resnet.embedder.embedder.convolution"].shape == (8, 3 * 7 * 7)
    assert {delta.rank for delta in adapter.values()} == {2, 6}
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == len(adapter) == 6
    for module, layer in layers.items():
        assert apart(adapter[module].dense(), layer.get_delta_weight("default").detach().flatten(1)) < 1e-6
    doubled = {m: LowRankDelta(2 * d.A, -3 * d.B) for m, d in adapter.items()}
    write_adapter(model, doubled, "default")
    assert distance(read_adapter(model, "default"), doubled) < 1e-5
    with pytest.raises(ValueError, match=r"needs A and B of shapes \(\(2, 147\), \(8, 2\)\), got \(\(1, 147\), "):
        write_adapter(model, doubled | {m: d.first(1) for m, d in doubled.items() if "embedder" in m}, "default")
    model.unload()


def test_the_stack_is_the_mean_of_what_clients_of_different_ranks_changed(resnet):
    weights, updates, wanted = {"a": 0.6, "b": 0.4}, [], {}
    for k, (client, weight) in enumerate(weights.items()):
        with attached(resnet, AdapterSpec(2 + 3 * k, 8.0, ("convolution",))) as model:
            moved(model, k)
            updates.append(ClientUpdate(client, 1, read_adapter(model)))
            for module, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)):
                change = layer.get_delta_weight("local").detach().double().flatten(1)
                name = module.removeprefix("base_model.model.")
                wanted[name] = wanted.get(name, 0) + weight * change
    outcome = build_method("flora").aggregate(updates, weights, GlobalModel())
    assert outcome.certificate.exact, outcome.certificate.reason
    model, _ = advance(GlobalModel(), outcome)
    assert model.merged.keys() == wanted.keys()
    assert all(apart(model.merged[m].dense(), wanted[m]) < 1e-6 for m in wanted)


def test_frozen_and_trained_parts_together_give_the_merged_models_logits(resnet, tmp_path):
    shapes = target_shapes(resnet, SPEC)
    assert shapes.items() <= weight_shapes(resnet).items()
    frozen = random_adapter(shapes, 7) | random_adapter({"resnet.embedder.embedder.convolution": (8, 147)}, 2)
    start, plain = fill_adapter({}, shapes, 4, FreshRows(0)), logits(resnet)
    with attached(resnet, SPEC, start, frozen) as model:
        assert distance(read_adapter(model, "merged"), frozen) < 1e-12
        assert distance(read_adapter(model), start) < 1e-12
        moved(model, 1)
        together, local = logits(model), read_adapter(model)
    whole = after(frozen, local)
    with carrying(resnet, whole) as model:
        assert apart(logits(model), together) < 1e-5
    copy = ResNetForImageClassification(resnet.config).eval()
    copy.load_state_dict(resnet.state_dict())
    merge_into(copy, whole)
    assert apart(logits(copy), together) < 1e-5
    assert apart(plain, together) > 1e-2
    for module, delta in whole.items():
        assert apart(delta.dense(), matrix(copy.get_submodule(module)) - matrix(resnet.get_submodule(module))) < 1e-5
    write_peft_folder(whole, tmp_path, FolderFacts("tiny", task_type="", kernels=kernels_of(resnet, whole)))
    assert distance(read_peft_folder(tmp_path), whole) < 1e-5
    assert read_peft_facts(tmp_path) == FolderFacts("tiny", task_type="", kernels=kernels_of(resnet, whole))
    again = PeftModel.from_pretrained(resnet, str(tmp_path)).eval()
    assert apart(logits(again), together) < 1e-5
    again.unload()


def test_the_merge_of_folders_keeps_kernels(resnet, tmp_path):
    shapes, parts = target_shapes(resnet, SPEC), []
    for k, name in enumerate(("one", "two")):
        own = {m: shape for m, shape in shapes.items() if k or "stages" in m}  # the first lacks one
        parts.append(random_adapter(own, 2 + k, seed=9 * k))
        facts = FolderFacts("tiny", task_type="", kernels=kernels_of(resnet, parts[k]))
        write_peft_folder(parts[k], tmp_path / name, facts)
    merge = merge_adapters(read_adapters([tmp_path / "one", tmp_path / "two"]), tmp_path / "both")
    assert merge.relative_error < 1e-5
    both = add_adapters(*(scale_adapter(part, 0.5) for part in parts))
    with carrying(resnet, both) as model:
        wanted = logits(model)
    again = PeftModel.from_pretrained(resnet, str(tmp_path / "both")).eval()
    assert apart(logits(again), wanted) < 1e-5
    again.unload()


LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    (nn.Conv1d(4, 6, 1, bias=False), (4, 11)),
    (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 11)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    (nn.Conv3d(2, 4, (1, 1, 3), stride=2), (2, 2, 3, 4, 5)),
    (nn.Conv3d(2, 4, 2, dilation=2, padding=1), (2, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=lambda value: str(value) if isinstance(value, tuple) else "")
@pytest.mark.parametrize("kind", ["factors", "dense", "rows"])
@torch.no_grad()
def test_a_change_beside_a_convolution_is_that_of_its_weight(layer, size, kind):
    generator = torch.Generator().manual_seed(0)
    x, (out, width) = torch.randn(size, generator=generator), matrix(layer).shape
    a, b = torch.randn(3, width, generator=generator), torch.randn(out, 3, generator=generator)
    delta = {
        "factors": LowRankDelta(a, b),
        "dense": DenseDelta(b @ a),
        "rows": RowScaleDelta(torch.randn(out, 1, generator=generator), a, b),
    }[kind]
    weight = layer.weight + added(delta, matrix(layer)).float().reshape(layer.weight.shape)
    wanted, plain = layer._conv_forward(x, weight, layer.bias), layer(x)
    with beside({layer: delta}):
        assert apart(layer(x), wanted) < 1e-5
    assert torch.equal(layer(x), plain)


def test_whole_kernels_are_trained_beside_the_base(resnet):
    shapes = target_shapes(resnet, SPEC)
    nothing = {m: DenseDelta(torch.zeros(shape)) for m, shape in shapes.items()}
    with dense_beside(resnet, nothing, "local", trains=True) as model:
        model(IMAGES, labels=torch.tensor([0, 1])).loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
        moved(model, 0)
        found, together = read_dense(model, "local"), logits(model)
    copy = ResNetForImageClassification(resnet.config).eval()
    copy.load_state_dict(resnet.state_dict())
    merge_into(copy, found)
    assert apart(logits(copy), together) < 1e-5


def test_penalties_and_principal_components_see_matrices(resnet):
    with attached(resnet, SPEC) as model:
        moved(model, 0)
        adapter = read_adapter(model)
        penalty = proximal_penalty(model, 2.0)
        tail = sum(d.B[:, 2:].norm() * d.A[2:].norm() for d in adapter.values())
        assert tail_penalty(model, 0.5).item() == pytest.approx(tail.item(), rel=1e-5)
        moved(model, 1)
        wanted = distance(read_adapter(model), adapter) ** 2
        assert penalty(model).item() == pytest.approx(wanted, rel=1e-4)
    shapes = target_shapes(resnet, SPEC)
    for module, delta in principal_components(resnet, shapes, 200).items():
        assert apart(delta.dense(), matrix(resnet.get_submodule(module))) < 1e-5


def kind_spec(name):
    return AdapterSpec(4, 8.0, ("convolution",), kind=name, seed=3)


def trained(base, name, frozen, seed):
    with train_kind(base, KINDS[name], kind_spec(name), frozen, FreshRows(0)) as (model, read):
        moved(model, seed)
        return read(), logits(model.eval())


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_kinds_that_scale_rows_scale_kernels(name, resnet):
    """What is read is what the model computes, over two rounds, and what clients' rule makes is the mean."""
    spec, frozen = kind_spec(name), {}
    for seed in (1, 2):
        change, found = trained(resnet, name, frozen, seed)
        frozen = after(frozen, change)
        with carrying(resnet, on_weights(resnet, spec, frozen)) as model:
            assert apart(logits(model), found) < 1e-5
    weights = {"a": 0.7, "b": 0.3}
    changes = [trained(resnet, name, frozen, seed)[0] for seed in (3, 4)]
    updates = [ClientUpdate(client, 1, change) for client, change in zip(weights, changes, strict=True)]
    outcome = build_method("flora").aggregate(updates, weights, GlobalModel(merged=frozen))
    assert outcome.certificate.exact, outcome.certificate.reason
    model, _ = advance(GlobalModel(merged=frozen), outcome)

    def dense(adapter):
        flat = on_weights(resnet, spec, adapter)
        return {m: added(delta, matrix(resnet.get_submodule(m))) for m, delta in flat.items()}

    start, now = dense(frozen), dense(model.merged)
    each = [dense(after(frozen, change)) for change in changes]
    assert len(now) == 6
    for module in now:
        wanted = 0.7 * (each[0][module] - start[module]) + 0.3 * (each[1][module] - start[module])
        assert apart(now[module] - start[module], wanted) < 1e-5


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_kinds_on_kernels_are_what_peft_merges(name, resnet):
    kind = KINDS[name]
    with attach(resnet, kind, kind_spec(name)) as (model, layers):
        moved(model, 0)
        for module, layer in layers.items():
            weight = layer.get_base_layer().weight
            before, delta = weight.detach().clone(), kind.unfold(layer, kind.read(layer))
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer().weight.detach()
            assert apart(added(delta, before.flatten(1)), (merged - before).flatten(1)) < 1e-5, module
            layer.get_base_layer().weight = weight
            weight.data = before
            layer.merged_adapters.clear()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv1d(4, 8, 3, groups=2), "a Conv1d with groups = 2"),
        (nn.Conv2d(4, 8, 3, dilation=2), r"a Conv2d with dilation = \(2, 2\)"),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), "a Conv2d with padding_mode = 'circular'"),
        (type("OwnConv2d", (nn.Conv2d,), {})(4, 8, 3), "a OwnConv2d, which computes in its own way"),
    ],
)
def test_what_peft_cannot_do_right_is_refused_before_it_is_attached(layer, reason):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    spec, message = AdapterSpec(2, 2.0, ("1.0",)), rf"got {reason} at 1\.0: leave it out of target_modules"
    with pytest.raises(ValueError, match=message):
        target_shapes(model, spec)
    with pytest.raises(ValueError, match=message), attached(model, None, frozen=random_adapter({"1.0": (8, 4)}, 2)):
        pass
    for kind in ("dora", "ia3"):
        with pytest.raises(ValueError, match=message):
            kind_shapes(model, KINDS[kind], spec)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert weight_shapes(model) == {"0": (2, 2)}
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["1.0"]))
    with pytest.raises(ValueError, match=message):
        read_adapter(peft, "default")


def test_the_dense_rest_of_a_depthwise_model_can_be_federated():
    torch.manual_seed(0)
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2))
    with pytest.raises(ValueError, match=r"groups = 8 at encoder\.stages\.0\.layers\.0\.dwconv"):
        target_shapes(model, AdapterSpec(8, 8.0, ("dwconv",)))
    shapes = target_shapes(model, AdapterSpec(8, 8.0, ("patch_embeddings", "pwconv1")))
    assert shapes["embeddings.patch_embeddings"] == (8, 3 * 4 * 4)
    assert shapes["encoder.stages.1.layers.0.pwconv1"] == (48, 12)
