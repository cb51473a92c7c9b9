"""Held-out loss by group, with and without generated answers."""

import pytest

from corolla.adapters import open_base
from corolla.client.config import DataConfig
from corolla.client.tasks import causal_lm
from tests.tiny import write_tiny_model

ROWS = [
    {"prompt": "say a", "completion": "a", "group": "letters"},
    {"prompt": "say b", "completion": "b b b", "group": "letters"},
    {"prompt": "say 1", "completion": "1 2", "group": "numbers"},
]


def test_the_loss_of_a_group_is_that_of_its_examples_alone(tmp_path):
    base = open_base(str(write_tiny_model(tmp_path)))
    config = DataConfig(max_new_tokens=0)
    examples = [causal_lm.encode(base.tokenizer, config, row) for row in ROWS]
    found = causal_lm.evaluate(base.model, base, examples, config)
    letters = causal_lm.evaluate(base.model, base, examples[:2], config)
    assert found["held_out_loss/letters"] == pytest.approx(letters["held_out_loss"], rel=1e-6)
    assert found["held_out_loss"] == pytest.approx(causal_lm.mean_loss(base.model, base, examples), rel=1e-6)
    learned = [sum(example.learned for example in part) for part in (examples[:2], examples[2:])]
    groups = [found["held_out_loss/letters"], found["held_out_loss/numbers"]]
    assert found["held_out_loss"] == pytest.approx(
        sum(n * loss for n, loss in zip(learned, groups, strict=True)) / sum(learned), rel=1e-6
    )
    assert {name: value for name, value in found.items() if name.startswith("examples")} == {
        "examples": 3, "examples/letters": 2, "examples/numbers": 1,
    }  # fmt: skip
    assert not any(name.startswith("exact_match") for name in found)
    asked = causal_lm.evaluate(base.model, base, examples, DataConfig(max_new_tokens=2))
    assert asked["held_out_loss"] == found["held_out_loss"]
    assert "exact_match/letters" in asked
