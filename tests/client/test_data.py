"""Examples: what is masked, what is learned, who gets which, and when."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.client.config import DataConfig
from corolla.client.data import load_client_data, round_order
from corolla.client.tasks import find_task
from corolla.client.tasks.causal_lm import encode
from corolla.client.tasks.task import IGNORED
from tests.tiny import tiny_tokenizer

ROW = {"prompt": "Say hi", "completion": "hi there", "family": "greetings"}


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids))


def test_the_chat_template_is_used_and_the_end_of_turn_is_learned():
    tokenizer = tiny_tokenizer()
    example = encode(tokenizer, DataConfig(system="Be brief."), ROW | {"group": "greetings"})
    assert (
        decode(tokenizer, example.input_ids)
        == "<|system|>Be brief.<|end|><|user|>Say hi<|end|><|assistant|>hi there<|end|>"
    )
    learned = [label for label in example.labels if label != IGNORED]
    assert decode(tokenizer, learned) == "hi there<|end|>"
    assert decode(tokenizer, example.prompt_ids).endswith("<|assistant|>")
    assert example.group == "greetings"


def test_what_a_template_writes_after_the_turn_is_not_learned():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\n'")
    example = encode(tokenizer, DataConfig(), ROW)
    assert decode(tokenizer, [x for x in example.labels if x != IGNORED]) == "hi there<|end|>"


@pytest.mark.parametrize("template", ["plain", "auto"])
def test_without_a_chat_template_a_plain_one_is_used(template):
    tokenizer = tiny_tokenizer()
    if template == "auto":
        tokenizer.chat_template = None
    example = encode(tokenizer, DataConfig(template=template), ROW)
    assert decode(tokenizer, example.input_ids) == "Say hi\nhi there<|end|>"
    assert decode(tokenizer, [x for x in example.labels if x != IGNORED]) == "hi there<|end|>"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="use 'plain'"):
        encode(tokenizer, DataConfig(template="chat"), ROW)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 15), st.integers(1, 6))
def test_every_example_comes_once_before_any_comes_twice(size, per_round, rounds):
    parts = [round_order(size, r * per_round, per_round, "seed", "client") for r in range(rounds)]
    sequence = sum(parts, [])
    assert sequence == round_order(size, 0, rounds * per_round, "seed", "client")
    for first in range(0, len(sequence) - size + 1, size):
        assert sorted(sequence[first : first + size]) == list(range(size))


def test_orders_differ_by_client_seed_and_epoch():
    order = round_order(50, 0, 50, 0, "a")
    assert order != round_order(50, 0, 50, 0, "b") != round_order(50, 0, 50, 1, "b")
    assert order != round_order(50, 50, 50, 0, "a")


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(config, partition=0, clients=2, max_length=64):
    return load_client_data(
        config, find_task("causal-lm"), tiny_tokenizer(), f"client-{partition}", partition, clients, 0, max_length
    )


def test_iid_partitions_cover_the_file_without_overlap(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW | {"prompt": str(i)} for i in range(11)])
    parts = [load(DataConfig(train=path, partition="iid", held_out_fraction=0.25), k, 3) for k in range(3)]
    prompts = [e.prompt for part in parts for e in (*part.train, *part.held_out)]
    assert sorted(prompts, key=int) == [str(i) for i in range(11)]
    assert [len(part.held_out) for part in parts] == [1, 1, 1]


def test_column_partitions_give_whole_values(tmp_path):
    rows = [ROW | {"prompt": str(i), "family": "abcde"[i % 5]} for i in range(20)]
    config = DataConfig(train=write(tmp_path / "a.jsonl", rows), held_out_fraction=0)
    groups = [sorted({e.group for e in load(config, k, 4).train}) for k in range(4)]
    assert sorted(sum(groups, [])) == list("abcde")
    assert all(groups)


def test_a_file_per_client(tmp_path):
    for k in range(2):
        write(tmp_path / f"client-{k}.jsonl", [ROW | {"prompt": f"of {k}"}] * 3)
    config = DataConfig(train=str(tmp_path / "{client}.jsonl"), held_out=str(tmp_path / "{client}.jsonl"))
    assert {e.prompt for e in load(config, 1).train + load(config, 1).held_out} == {"of 1"}


def test_too_long_examples_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW, ROW | {"prompt": "x" * 100}])
    data = load(DataConfig(train=path, partition="iid", held_out_fraction=0), clients=1)
    assert (len(data.train), data.left_out["too_long"]) == (1, 1)
    with pytest.raises(ValueError, match=r"at most 8 tokens, got 2 rows, of which 2 too long.*train\.max_length"):
        load(DataConfig(train=path, partition="iid", held_out_fraction=0), clients=1, max_length=8)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"question": "a", "completion": "b"}] * 2,
            {"partition": "iid"},
            r"must have the columns of its format .*, got question, completion.*data\.completion",
        ),
        ([ROW], {}, r"2 clients need as many values of 'family', got 1"),
        ([{"prompt": "a", "completion": "b"}], {}, r"needs the column 'family'.*'iid'"),
    ],
)
def test_broken_data_is_named_with_the_cure(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(train=write(tmp_path / "a.jsonl", rows), **options))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load(DataConfig(train="nowhere.jsonl"))


def test_a_file_that_changed_is_read_again(tmp_path):
    """A worker lasts from run to run, and a client's data may have grown between them."""
    from corolla.client.data import client_sources

    path = tmp_path / "train.jsonl"
    config = DataConfig(train=str(path), partition="iid")
    for rows in (3, 5):
        path.write_text("".join(json.dumps({"prompt": f"{rows}", "completion": f"{k}"}) + "\n" for k in range(rows)))
        for partition in (0, 1):
            train, _ = client_sources(config, "a", partition, 2, 0)
            assert {row["prompt"] for row in train.rows} == {str(rows)}
        whole, part = client_sources(config, "a", 0, 1, 0)
        assert len(whole) + len(part or ()) == rows
