"""A classifier whose layers are convolutions, through whole runs: learned, proven exact, exported, planned."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from corolla import simulate
from corolla.adapters.export import running_logits
from corolla.client.estimate import Work, estimate_memory
from corolla.server.config import Config
from corolla.simulations.export import export_checkpoint, open_checkpoint
from tests.client.test_classification import LABELS, config
from tests.client.test_classification import rows as rows  # a fixture
from tests.tiny import write_tiny_squeezebert

CONVOLUTIONS = ("query", "value", "intermediate.conv1d")


@pytest.fixture(scope="module")
def squeezebert(tmp_path_factory):
    return write_tiny_squeezebert(tmp_path_factory.mktemp("squeezebert"))


def of(squeezebert, rows, out, **sections) -> Config:
    tables = {"model": {"attention": "eager"}, "adapter": {"target_modules": CONVOLUTIONS}} | sections
    return config(squeezebert, rows, out, **tables)


def rounds(run):
    return [line for line in run.metrics if line["kind"] == "round"]


@pytest.mark.parametrize("sections", [{}, {"aggregation": {"method": "full"}}])
def test_it_learns_and_is_exact(squeezebert, rows, tmp_path, sections):
    run = simulate(of(squeezebert, rows, tmp_path / "run", **sections))
    assert [line["update"]["certificate"]["exact"] for line in rounds(run)] == [True] * 3
    first, last = (line["mean"] for line in run.metrics if line["kind"] == "evaluation")
    assert last["probe_loss"] < first["probe_loss"]
    assert run.adapter["transformer.encoder.layers.0.intermediate.conv1d"].shape == (48, 32)


def test_both_exports_are_read_by_others(squeezebert, rows, tmp_path):
    run = simulate(of(squeezebert, rows, tmp_path / "run"))
    _, base, adapter = open_checkpoint(run.folder, None)
    probe = torch.randint(0, 264, (2, 32), generator=torch.Generator().manual_seed(0))
    wanted = running_logits(base, adapter)
    labels = {"id2label": dict(enumerate(LABELS)), "num_labels": 2}
    plain = AutoModelForSequenceClassification.from_pretrained(squeezebert, **labels)
    loaded = PeftModel.from_pretrained(plain, str(run.folder / "adapter")).eval()
    assert torch.allclose(loaded(input_ids=probe, attention_mask=torch.ones_like(probe)).logits, wanted, atol=1e-4)
    assert export_checkpoint(run.folder, tmp_path / "merged", merged=True).logits_error < 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(input_ids=probe, attention_mask=torch.ones_like(probe)).logits, wanted, atol=1e-4)


def test_dora_of_it_is_exact_and_exported_merged(squeezebert, rows, tmp_path):
    sections = {"adapter": {"target_modules": CONVOLUTIONS, "kind": "dora"}, "clients": {"ranks": (4,)}}
    run = simulate(of(squeezebert, rows, tmp_path / "run", **sections))
    assert [line["update"]["certificate"]["exact"] for line in rounds(run)] == [True] * 3
    first, last = (line["mean"] for line in run.metrics if line["kind"] == "evaluation")
    assert last["probe_loss"] < first["probe_loss"]
    assert export_checkpoint(run.folder, tmp_path / "merged", merged=True).logits_error < 1e-5


def test_a_group_of_convolutions_is_refused_by_name(squeezebert, rows, tmp_path):
    adapter = {"target_modules": ("output.conv1d", "key")}
    message = r"groups = 2 at transformer\.encoder\.layers\.0\.output\.conv1d: leave it out"
    with pytest.raises(RuntimeError, match=message):
        simulate(of(squeezebert, rows, tmp_path / "no", adapter=adapter))


def test_its_memory_is_estimated_with_kernels(squeezebert, rows, tmp_path):
    settings = of(squeezebert, rows, tmp_path / "run").settings()
    small, large = (estimate_memory(settings, Work(32), rank, 2).adapter for rank in (2, 4))
    assert large - small == 2 * 4 * 2 * (2 * (32 + 32) + 32 + 48)  # ranks, bytes, layers, sides of the three
