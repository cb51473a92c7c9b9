"""Multiple choice: the likelihood that is meant, by an independent computation, a model of known mind, and lm-eval."""

import json
from types import SimpleNamespace

import pytest
import torch

from corolla.client import evaluation
from corolla.client.choices import encode_choices, score_choices
from corolla.client.config import DataConfig
from corolla.client.data import read_questions, read_source

PLAIN, CHAT = DataConfig(template="plain"), DataConfig(template="chat")


def questions(count: int) -> list[dict]:
    """Questions whose choices differ in length, so that sums, means and padding differ; half have letters for choices."""
    kinds = (["no", "a longer answer", "maybe", "x", "something else entirely"], list("abcde"))
    return [
        {
            "prompt": f"Question {'?' * (i % 7)}{i}",
            "choices": [kinds[i % 2][(i + j) % 5] + "é" * (j % 2) * (1 - i % 2) for j in range(2 + i % 3)],
            "answer": i % 2,
            "group": "ab"[i % 2],
        }
        for i in range(count)
    ]


class Bigram(torch.nn.Module):
    """p(next byte | byte) from a table: after anything, "y" is likelier than "n", and what `always` says certain."""

    def __init__(self, always: float) -> None:
        super().__init__()
        self.table = torch.zeros(264, 264)
        self.table[:, ord("y") - 33] += always  # in the byte alphabet "!" is token 0

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_of_known_mind_chooses_what_it_prefers(tiny):
    """Of "y" and "n" it takes the "y"; of "y" and "yyyn" too by sum, as that has four factors; by character not: three
    of its four are the likely letter, against "n" with none."""
    token = tiny.tokenizer("y")["input_ids"][0]
    assert token == ord("y") - 33
    rows = [
        {"prompt": "p", "choices": ["n", "y"], "answer": 1, "group": "one"},
        {"prompt": "p", "choices": ["n", "yyyn"], "answer": 1, "group": "two"},
    ]
    examples = [encode_choices(tiny.tokenizer, PLAIN, row) for row in rows]
    found = score_choices(Bigram(2.0), tiny, examples)
    likely, other = torch.log_softmax(Bigram(2.0).table[0], 0)[[token, 0]].tolist()
    assert found.sums[1] == pytest.approx((other, 3 * likely + other), rel=1e-5)
    assert found.per_token()[1] == pytest.approx([other, (3 * likely + other) / 4], rel=1e-5)
    assert found.picks() == [1, 0]
    assert found.picks_by_character() == [1, 1]
    metrics = found.metrics()
    assert (metrics["choice_accuracy"], metrics["choice_accuracy_norm"]) == (0.5, 1.0)
    assert (metrics["choice_accuracy/one"], metrics["choice_accuracy/two"], metrics["examples/two"]) == (1.0, 0.0, 1.0)


def by_hand(base, prompt: str, choice: str) -> float:
    """Σ log p of one choice: one sequence, no batch, no padding."""
    given, answer = (base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, choice))
    with torch.no_grad():
        rows = torch.log_softmax(base.model(torch.tensor([given + answer])).logits[0].double(), -1)
    return sum(float(rows[len(given) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize(("config", "text"), [(PLAIN, "{}\n"), (CHAT, "<|user|>{}<|end|><|assistant|>")])
def test_sums_equal_an_independent_computation(config, text, tiny):
    rows = questions(5)
    found = score_choices(tiny.model, tiny, [encode_choices(tiny.tokenizer, config, row) for row in rows])
    for row, sums in zip(rows, found.sums, strict=True):
        expected = [by_hand(tiny, text.format(row["prompt"]), choice) for choice in row["choices"]]
        assert sums == pytest.approx(expected, rel=1e-5)


def test_batches_and_padding_do_not_matter(tiny, monkeypatch):
    examples = [encode_choices(tiny.tokenizer, PLAIN, row) for row in questions(9)]
    found = []
    for size in (1, 4, 32):
        monkeypatch.setattr(evaluation, "BATCH", size)
        found.append(score_choices(tiny.model, tiny, examples))
        assert found[-1] == score_choices(tiny.model, tiny, examples)
    for other in found[1:]:
        assert other.picks() == found[0].picks()
        for one, two in zip(found[0].sums, other.sums, strict=True):
            assert one == pytest.approx(two, rel=1e-5)


def test_log_likelihoods_equal_those_of_lm_eval(tiny):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rows = questions(6)
    pairs = [(f"<|user|>{row['prompt']}<|end|><|assistant|>", choice) for row in rows for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=4).loglikelihood(requests)
    ours = score_choices(tiny.model, tiny, [encode_choices(tiny.tokenizer, CHAT, row) for row in rows])
    assert [value for sums in ours.sums for value in sums] == pytest.approx([value for value, _ in theirs], rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "choices": ["a"], "answer": 0}', "line 2, must have two or more texts in 'choices'"),
        ('{"prompt": "p", "choices": ["a", ""], "answer": 0}', "line 2, must have two or more texts"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}', "line 2, must have the right choice's index, .* got 2"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "line 2, .* got True"),
        ('{"choices": ["a", "b"], "answer": 0}', "line 2, must have a question in 'prompt', got None"),
        ("[1]", "line 2, must be an object with columns"),
        ("{", "line 2, must be JSON"),
    ],
)
def test_a_broken_question_is_named_by_its_line(line, message, tmp_path):
    path = tmp_path / "mc.jsonl"
    path.write_text('{"prompt": "p", "choices": ["a", "b"], "answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(read_source(str(path), PLAIN), PLAIN)


def test_only_questions_are_read_as_such(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    assert read_questions(read_source(str(path), PLAIN), PLAIN) is None
    path.write_text("\n".join(json.dumps(row | {"family": row["group"]}) for row in questions(3)) + "\n\n")
    assert read_questions(read_source(str(path), PLAIN), PLAIN) == questions(3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_source(str(tmp_path / "none.jsonl"), PLAIN)
