"""`corolla noise` and `corolla merge` on adapters that plain PEFT trained in another process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from corolla.cli import app

ADAPTERS = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterned": {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
        "target_modules": ["q_proj", "down_proj"],
    },
}
EQUAL = {f"equal-{k}": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} for k in range(2)}
ODD = {"dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}}

SCRIPT = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

base, out = sys.argv[1:3]
for seed, (name, options) in enumerate(json.loads(sys.argv[3]).items()):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 256, (4, 24))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out + "/" + name)
"""
"""Plain PEFT, as a user without Corolla has it."""


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """A folder with an adapter folder by each name, trained by plain PEFT in another process."""
    folder = tmp_path_factory.mktemp("adapters")
    wanted = json.dumps(ADAPTERS | EQUAL | ODD)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_folder), str(folder), wanted], check=True, capture_output=True
    )
    return folder


def corolla(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def dense_by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Module -> ΔW as plain PEFT computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and "default" in m.lora_A}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


def weighted_sum(base, trained, weights):
    total: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for module, matrix in dense_by_peft(base, trained / name).items():
            total[module] = total.get(module, 0) + weight * matrix
    return total


def relative(one, other):
    error = sum((one.get(m, 0) - other[m]).square().sum() for m in other)
    return float((error / sum(m.square().sum() for m in other.values())).sqrt())


def test_a_merge_loaded_by_plain_peft_is_the_weighted_sum(trained, tiny_folder, tmp_path):
    out = tmp_path / "merged"
    found = corolla("merge", *(trained / n for n in ADAPTERS), "--weights", "1,2,5", "--out", out)
    assert found.exit_code == 0, found.output
    assert "exact" in found.output
    expected = weighted_sum(tiny_folder, trained, dict(zip(ADAPTERS, (0.125, 0.25, 0.625), strict=True)))
    assert relative(dense_by_peft(tiny_folder, out), expected) < 1e-6
    proof = json.loads((out / "certificate.json").read_text())
    assert proof["certificate"]["exact"]
    assert proof["weights"] == {"patterned": 0.625, "rslora": 0.25, "small": 0.125}


@pytest.mark.parametrize(("options", "exact"), [(("--rank", "2"), False), (("--energy", "0.9"), False), ((), True)])
def test_a_cut_merge_says_what_it_lost_and_it_is_what_plain_peft_finds(options, exact, trained, tiny_folder, tmp_path):
    out = tmp_path / "merged"
    assert corolla("merge", *(trained / n for n in ADAPTERS), *options, "--out", out).exit_code == 0
    proof = json.loads((out / "certificate.json").read_text())
    expected = weighted_sum(tiny_folder, trained, dict.fromkeys(ADAPTERS, 1 / 3))
    assert proof["relative_error"] == pytest.approx(relative(dense_by_peft(tiny_folder, out), expected), abs=1e-6)
    assert proof["certificate"]["exact"] == exact
    if options == ("--energy", "0.9"):
        assert 0 < proof["relative_error"] <= 0.1**0.5
    if options == ("--rank", "2"):
        assert proof["rank"] == 2


def test_other_methods_merge_with_their_error(trained, tiny_folder, tmp_path):
    for method in ("fedit", "zero-padding", "rbla", "florist", "flexlora"):
        out = tmp_path / method
        found = corolla("merge", *(trained / n for n in EQUAL), "--method", method, "--out", out)
        assert found.exit_code == 0, found.output
        proof = json.loads((out / "certificate.json").read_text())
        expected = weighted_sum(tiny_folder, trained, dict.fromkeys(EQUAL, 0.5))
        assert proof["relative_error"] == pytest.approx(relative(dense_by_peft(tiny_folder, out), expected), abs=1e-6)
        assert proof["certificate"]["exact"] == (method == "flexlora")


def test_noise_names_every_method_and_equals_the_merge(trained, tmp_path):
    target = tmp_path / "noise.json"
    found = corolla("noise", *(trained / n for n in ADAPTERS), "--json", target, "--html", tmp_path / "noise.html")
    assert found.exit_code == 0, found.output
    noise = json.loads(target.read_text())
    assert (noise["init"], noise["method"]) == ("unknown", "")
    assert noise["share"].keys() == set(ADAPTERS)
    assert "averages clients of one rank" in noise["methods"]["fedit"]["not_applicable"]
    for method in ("zero-padding", "rbla", "florist"):
        out = tmp_path / method
        assert corolla("merge", *(trained / n for n in ADAPTERS), "--method", method, "--out", out).exit_code == 0
        proof = json.loads((out / "certificate.json").read_text())
        assert noise["methods"][method]["relative_error"] == pytest.approx(proof["relative_error"], rel=1e-5)
        assert method in found.output
    assert "<html" in (tmp_path / "noise.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("noise", "small", "dora"), "use_dora = True"),
        (("noise", "small", "small"), "must be different folders"),
        (("noise", "small", "none"), "adapter_config.json"),
        (("noise", "small", "rslora", "--weights", "1"), "one positive number for each of 2"),
        (("noise", "small", "rslora", "--weights", "1,nan"), "one positive number for each of 2"),
        (("noise", "small", "--weights", "a"), "numbers such as 3,1,1, got 'a'"),
        (("merge", "small", "--method", "ffa", "--out", "new"), "cannot merge adapters of other clients"),
        (("merge", "small", "rslora", "--method", "fedit", "--out", "new"), "one rank"),
        (("merge", "small", "--energy", "1.5", "--out", "new"), "must be in (0, 1], got 1.5"),
        (("merge", "small", "--out", "small"), "must be a new folder"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(arguments, reason, trained):
    places = [trained / a if (trained / a).exists() or a in ("none", "new") else a for a in arguments]
    found = corolla(*places)
    assert found.exit_code == 1
    assert reason in " ".join(found.output.split())


def copied(adapter: Path, to: Path, **changes) -> Path:
    """A copy of an adapter folder with changes in its configuration."""
    shutil.copytree(adapter, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | changes))
    return to


def test_adapters_of_two_tasks_are_refused(trained, tmp_path):
    """Their module names differ by what PEFT wraps: a merge would hold names that no model has."""
    other = copied(trained / "small", tmp_path / "other", task_type="FEATURE_EXTRACTION")
    found = corolla("noise", trained / "small", other)
    assert found.exit_code == 1
    assert "of one base and task are needed" in found.output


def test_adapters_of_two_bases_are_refused(trained, tmp_path):
    other = copied(trained / "small", tmp_path / "other", base_model_name_or_path="another/base")
    found = corolla("noise", trained / "small", other)
    assert found.exit_code == 1
    assert "adapters of one base are needed" in found.output
    assert corolla("noise", trained / "small", other, "--any-base").exit_code == 0
