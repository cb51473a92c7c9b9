"""Factors in and out of live models: nothing lost, nothing partly read, the base untouched."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corolla.adapters import (
    AdapterSpec,
    FolderFacts,
    attached,
    read_adapter,
    read_peft_folder,
    target_shapes,
    weight_shapes,
    write_adapter,
    write_peft_folder,
)
from corolla.aggregation import FreshRows, LowRankDelta, add, distance, fill_adapter
from tests.aggregation.federations import random_delta
from tests.tiny import tiny_gpt2, tiny_llama

QV = AdapterSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))


def random_adapter(shapes, rank, seed=0, size=0.05):
    return {m: random_delta(*shape, rank, seed + i, size) for i, (m, shape) in enumerate(sorted(shapes.items()))}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 6, "lora_alpha": 5, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "all-linear", "layers"],
)
def test_read_adapter_is_the_change_that_peft_computes(options):
    base = tiny_llama()
    config = LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))
    model = get_peft_model(base, config)
    adapter = read_adapter(model, "default")
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapter
    assert adapter.keys() == layers.keys()
    for module, layer in layers.items():
        dense = layer.get_delta_weight("default").detach()
        assert torch.allclose(adapter[module].dense(), dense, atol=1e-6 * float(dense.detach().norm()))
    doubled = {m: LowRankDelta(2 * d.A, -3 * d.B) for m, d in adapter.items()}
    write_adapter(model, doubled, "default")
    assert distance(read_adapter(model, "default"), doubled) < 1e-5


def test_conv1d_modules_are_read_and_exported_right(tmp_path):
    base = tiny_gpt2().eval()
    tokens = torch.arange(12)[None]
    plain = base(tokens).logits.detach()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    expected = model(tokens).logits.detach()
    adapter = read_adapter(model, "default")
    assert {d.shape for d in adapter.values()} == {(96, 32)}
    base = model.unload()
    write_peft_folder(adapter, tmp_path, FolderFacts("tiny", fan_in_fan_out=True))
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()(tokens).logits
    assert (expected - plain).abs().max() > 1e-3
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
        ({"target_modules": ["q_proj"], "target_parameters": ["self_attn.v_proj.weight"]}, "target_parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_plain_lora_is_refused_by_name(options, named):
    base = tiny_gpt2() if options.get("target_modules") == ["c_attn"] else tiny_llama()
    model = get_peft_model(base, LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | options)))
    with pytest.raises(ValueError, match=named):
        read_adapter(model, "default")


def test_the_frozen_part_acts_and_never_trains(tiny):
    before = state_of(tiny.model)
    shapes = target_shapes(tiny.model, QV)
    assert shapes["model.layers.0.self_attn.v_proj"] == (16, 32)
    assert len(shapes) == 4
    start = fill_adapter({}, shapes, 4, FreshRows(0))
    frozen = random_adapter(shapes, 7) | {"model.layers.1.mlp.up_proj": random_delta(48, 32, 2, 9, 0.05)}
    tokens = torch.arange(20)[None]
    plain = tiny.model(tokens).logits.detach()
    with attached(tiny.model, QV, start, frozen) as model:
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(".local." in name for name in trained)
        assert len(trained) == 8
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        together = model(tokens).logits.detach()
        local, merged = read_adapter(model), read_adapter(model, "merged")
    assert distance(merged, frozen) < 1e-12
    assert distance(local, start) > 1e-3
    assert_untouched(tiny.model, before)
    assert torch.equal(tiny.model(tokens).logits, plain)
    both = {m: add([d for d in (frozen.get(m), local.get(m)) if d]) for m in frozen}
    with attached(tiny.model, None, frozen=both) as model:
        assert torch.allclose(model(tokens).logits, together, atol=1e-5)


@pytest.mark.parametrize("trains", [("A",), ("B",)])
def test_a_rule_can_freeze_one_factor(tiny, trains):
    with attached(tiny.model, QV, trains=trains) as model:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all(f"lora_{trains[0]}.local" in name for name in names)


def test_attaching_again_and_after_a_failure_leaves_no_trace(tiny, recwarn):
    before = state_of(tiny.model)
    with pytest.raises(KeyError, match="planned"), attached(tiny.model, QV):
        raise KeyError("planned")
    for rank in (2, 9):
        with attached(tiny.model, AdapterSpec(rank, 1.0, "all-linear")) as model:
            assert {d.rank for d in read_adapter(model).values()} == {rank}
    assert_untouched(tiny.model, before)
    assert not [w for w in recwarn if "second time" in str(w.message)]


def test_write_adapter_refuses_what_does_not_fit_before_it_writes(tiny):
    shapes = target_shapes(tiny.model, QV)
    with attached(tiny.model, QV, fill_adapter({}, shapes, 4, FreshRows(0))) as model:
        good = read_adapter(model)
        module = "model.layers.0.self_attn.q_proj"
        for wrong, message in [
            ({m: d for m, d in good.items() if m != module}, f"got none for {module}"),
            (good | {"lm_head": good[module]}, "unknown ones: lm_head"),
            (good | {module: good[module].first(3)}, f"{module}.*needs A and B of shapes"),
        ]:
            with pytest.raises(ValueError, match=message):
                write_adapter(model, wrong)
            assert distance(read_adapter(model), good) < 1e-12
        with pytest.raises(RuntimeError, match=f"A of {module} was loaded with an error"):
            write_adapter(model, good | {module: LowRankDelta(good[module].A * float("nan"), good[module].B)})


def test_a_bf16_base_keeps_float32_factors(tiny_folder):
    base = tiny_llama().to(torch.bfloat16)
    shapes = target_shapes(base, QV)
    adapter = random_adapter(shapes, 4, size=1e-5)
    with attached(base, QV, adapter) as model:
        assert distance(read_adapter(model), adapter) < 1e-9


def test_a_folder_by_peft_is_read_as_peft_reads_it(tmp_path):
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    options |= {"alpha_pattern": {"v_proj": 3}, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny_llama(), LoraConfig(**options))
    model.save_pretrained(tmp_path)
    assert distance(read_peft_folder(tmp_path), read_adapter(model, "default")) < 1e-6


def test_a_folder_that_is_none_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        read_peft_folder(tmp_path)
    with pytest.raises(ValueError, match="at least one component"):
        write_peft_folder({}, tmp_path, FolderFacts("tiny"))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_linear_modules_of_a_base_hold_all_that_can_be_adapted(make):
    model = make()
    adapted = target_shapes(model, AdapterSpec(2, 2.0, "all-linear"))
    assert adapted.items() <= weight_shapes(model).items()
