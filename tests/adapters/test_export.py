"""Exports are proven on writing; here they are read by others."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from corolla.adapters import AdapterSpec, export_adapter, export_merged, target_shapes
from corolla.adapters.export import merge_into, running_logits
from corolla.aggregation import scale_adapter
from tests.adapters.test_lora import assert_untouched, random_adapter, state_of

ALL = AdapterSpec(3, 3.0, "all-linear")


def test_the_peft_folder_gives_the_running_models_logits(tiny, tiny_folder, tmp_path):
    adapter = random_adapter(target_shapes(tiny.model, ALL), 5)
    before = state_of(tiny.model)
    assert export_adapter(tiny, adapter, tmp_path) < 1e-5
    assert_untouched(tiny.model, before)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    probe = torch.randint(0, 264, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded(probe).logits, running_logits(tiny, adapter), atol=1e-4)


def test_the_merged_checkpoint_gives_the_running_models_logits(tiny, tmp_path):
    adapter = random_adapter(target_shapes(tiny.model, ALL), 5)
    before = state_of(tiny.model)
    assert export_merged(tiny, adapter, tmp_path) < 1e-5
    assert_untouched(tiny.model, before)
    probe = torch.randint(0, 264, (2, 32), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (merged(probe).logits - tiny.model(probe).logits).abs().max() > 1e-2
    assert torch.allclose(merged(probe).logits, running_logits(tiny, adapter), atol=1e-4)


def test_a_wrong_export_is_found_out(tiny, tmp_path, monkeypatch):
    adapter = random_adapter(target_shapes(tiny.model, ALL), 5)
    from corolla.adapters import export

    right = export.write_peft_folder
    monkeypatch.setattr(export, "write_peft_folder", lambda a, *rest: right(scale_adapter(a, 1.01), *rest))
    with pytest.raises(RuntimeError, match="running model's logits"):
        export_adapter(tiny, adapter, tmp_path)


def test_an_update_lost_in_rounding_is_found_out(tiny, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    shapes = target_shapes(tiny.model, ALL)
    with pytest.raises(RuntimeError, match="lost in rounding"):
        merge_into(model, random_adapter(shapes, 2, size=1e-10))
    with pytest.raises(ValueError, match="float32 master"):
        merge_into(model.to(torch.bfloat16), random_adapter(shapes, 2))
