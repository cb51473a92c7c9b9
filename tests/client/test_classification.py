"""Classification: the head is drawn the same everywhere, trained whole, averaged exactly, and exported."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from corolla.adapters import Head, head_shapes, open_base
from corolla.aggregation import DenseDelta, LowRankDelta, whole
from corolla.client.config import DataConfig
from corolla.client.open import open_client
from corolla.client.tasks import find_task
from corolla.simulations import simulate as simulation
from corolla.simulations.evaluate import evaluate_checkpoint
from corolla.simulations.export import export_checkpoint
from tests.simulations.federation import tiny_config
from tests.tiny import write_tiny_bert

GOOD, BAD = ("fine", "good", "sun", "joy"), ("bad", "rain", "grim", "woe")
LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    texts = [(f"{a} {b}", label) for label, words in (("good", GOOD), ("bad", BAD)) for a in words for b in words]
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in texts * 3))
    return path


def config(bert, rows, out, **sections):
    base = {
        "data": {"train": str(rows), "partition": "iid", "labels": LABELS, "held_out_fraction": 0.25},
        "adapter": {"target_modules": ("query", "value")},
        "train": {"task": "classification", "local_steps": 8, "batch_size": 8, "learning_rate": 2e-2},
        "run": {"rounds": 3},
    }
    return tiny_config(bert, out, **{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


@pytest.mark.parametrize("method", ["flora", "warm", "zero-padding"])
def test_a_federation_learns_to_classify_and_the_head_is_averaged(bert, rows, tmp_path, method):
    run = simulation.simulate(config(bert, rows, tmp_path / "run", aggregation={"method": method}))
    first, last = (line["clients"] for line in run.metrics if line["kind"] == "evaluation")
    before, after = (sum(c["accuracy"] for c in clients.values()) / len(clients) for clients in (first, last))
    assert after > max(0.9, before) or method == "zero-padding"  # whose noise is too large for so short a run
    certificate = [line for line in run.metrics if line["kind"] == "round"][-1]["update"]["certificate"]
    assert "classifier averaged as whole weights" in certificate["reason"]
    assert certificate["exact"] == (method != "zero-padding")


def test_a_clip_counts_adapter_and_head_together(bert, rows, tmp_path):
    clip = {"method": "warm", "robust": "clip", "clip_norm": 0.05}
    run = simulation.simulate(config(bert, rows, tmp_path / "run", aggregation=clip))
    for line in (line for line in run.metrics if line["kind"] == "round"):
        for facts in line["clients"].values():
            judged = facts["judged"]
            assert facts["weight"] == pytest.approx(judged["weight_before"] * min(1, 0.05 / judged["norm"]))
        assert 0 < line["update"]["norm"] <= 0.05 * (1 + 1e-6)
        assert line["update"]["certificate"]["exact"]
        assert "classifier averaged as whole weights" in line["update"]["certificate"]["reason"]


def test_a_private_round_noises_the_head_as_well(bert, rows, tmp_path):
    sections = {"aggregation": {"method": "ffa", "weights": "uniform"}, "run": {"rounds": 1, "evaluate": "never"}}
    private = {"noise_multiplier": 300.0, "clip_norm": 1e-3}  # the noise is nearly all there is
    run = simulation.simulate(config(bert, rows, tmp_path / "run", privacy=private, **sections))
    deviation = 300.0 * 1e-3 / 3
    heads = {m: d for m, d in run.model.merged.items() if isinstance(d, DenseDelta)}
    assert heads
    for delta in heads.values():
        size = deviation * delta.W.numel() ** 0.5
        assert 0.5 * size < float(delta.W.norm()) < 2 * size or delta.W.numel() < 32
    assert max(d.W.numel() for d in heads.values()) >= 32


def test_one_round_of_the_head_is_the_weighted_mean_of_the_replies(bert, rows, tmp_path):
    run = simulation.simulate(config(bert, rows, tmp_path / "run", run={"rounds": 1, "keep_replies": True}))
    folder = simulation.RunFolder.open(run.folder)
    line = next(line for line in run.metrics if line["kind"] == "round")
    replies = folder.load_replies(1)
    expected = sum(line["clients"][c]["weight"] * reply["classifier"].W for c, reply in replies.items())
    assert torch.allclose(whole(run.model)["classifier"].W, expected, atol=1e-6)
    assert len({tuple(reply["classifier"].W.flatten().tolist()) for reply in replies.values()}) == 3
    assert all(isinstance(d, LowRankDelta) for r in replies.values() for m, d in r.items() if m != "classifier")


def test_the_export_is_a_plain_peft_classifier(bert, rows, tmp_path):
    run = simulation.simulate(config(bert, rows, tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = PeftModel.from_pretrained(plain, str(run.folder / "adapter")).eval()
    inputs = tokenizer(["joy sun", "woe grim", "rain bad", "fine fine"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert model(**inputs).logits.argmax(1).tolist() == [1, 0, 0, 1]
    report = export_checkpoint(run.folder, tmp_path / "merged", merged=True)
    assert report.logits_error < 1e-4
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, model(**inputs).logits, atol=1e-4)
    assert merged.config.id2label == {0: "bad", 1: "good"}


def test_evaluate_writes_the_labels_that_it_said(bert, rows, tmp_path):
    run = simulation.simulate(config(bert, rows, tmp_path / "run"))
    base, tuned = evaluate_checkpoint(run.folder, rows, answers=tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert tuned["accuracy"] == sum(s["global"] == s["completion"] for s in said) / len(said) > base["accuracy"]


def test_a_missing_head_is_drawn_the_same_whatever_was_drawn_before(bert):
    head = Head("classification", LABELS)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        open_base.__globals__["_open"].cache_clear()
        heads.append(open_base(str(bert), device="cpu", head=head).model.classifier.weight.clone())
    assert torch.equal(*heads)
    assert heads[0].std() > 0.01


def test_the_order_of_labels_is_part_of_the_base(bert):
    one, other = (
        open_base(str(bert), device="cpu", head=Head("classification", labels)) for labels in (LABELS, LABELS[::-1])
    )
    assert one.hash != other.hash
    assert head_shapes(one.model, one.head) == {"classifier": (2, 33)}


def test_all_linear_leaves_the_head_to_itself(bert, rows, tmp_path):
    chosen = config(bert, rows, tmp_path, adapter={"target_modules": "all-linear"})
    hello = open_client(chosen.settings(), {"partition-id": 0}).hello()
    assert "classifier" not in hello.shapes
    assert hello.heads == {"classifier": (2, 33)}


@pytest.mark.parametrize(
    ("data", "message"),
    [({"labels": ()}, r"needs two labels or more \(data\.labels\), got \[\]"), ({"labels": ("a", "a")}, "must differ")],
)
def test_labels_that_cannot_be_are_refused_before_anything_runs(bert, rows, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        config(bert, rows, tmp_path, data=data)


def test_a_label_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match=r"one of data\.labels \['bad', 'good'\], got 'so-so'"):
        find_task("classification").encode(None, DataConfig(labels=LABELS), {"text": "x", "label": "so-so"})
