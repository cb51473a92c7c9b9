"""Every format and every kind of file: trained on until the loss falls; broken, refused by its line."""

import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset

from corolla.adapters import AdapterSpec, Head, attached, open_base
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.data import encode_source, load_client_data, read_source
from corolla.client.tasks import find_task
from corolla.client.training import train_round
from tests.tiny import tiny_tokenizer

N = 12
ROWS = {
    "prompt-completion": [{"prompt": f"Say {i}", "completion": f"it is {i}"} for i in range(N)],
    "instruction": [{"instruction": "Repeat", "input": f"{i}", "output": f"so: {i}"} for i in range(N)],
    "chat": [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(N)
    ],
    "share-gpt": [
        {"conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": f"it is {i}"}]}
        for i in range(N)
    ],
    "text": [{"text": f"Number {i} is {i} and no other"} for i in range(N)],
    "text-label": [{"text": f"{'good' if i % 2 else 'poor'} thing {i}", "label": i % 2} for i in range(N)],
    "preference": [{"prompt": f"Say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(N)],
}
TASKS = {"text-label": "classification", "preference": "preference"}
CONFIG = DataConfig(labels=("0", "1"), held_out_fraction=0, template="plain", partition="iid")


def write(path: Path, rows: list[dict]) -> str:
    """The rows in the kind of file that the ending names."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(row["text"] for row in rows) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def classifier(tiny_folder):
    return open_base(str(tiny_folder), device="cpu", head=Head("classification", ("0", "1")))


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_and_trained_on_until_the_loss_falls(name, tiny, classifier, tmp_path):
    task = find_task(TASKS.get(name, "causal-lm"))
    base = classifier if name == "text-label" else tiny
    path = write(tmp_path / "rows.jsonl", ROWS[name])
    config = CONFIG.model_copy(update={"train": path})
    data = load_client_data(config, task, base.tokenizer, "a", 0, 1, 0, 256)
    assert len(data.train) == N
    assert not any(data.left_out.values())
    train = TrainConfig(task=task.name, local_steps=12, batch_size=6, learning_rate=3e-2)
    spec = AdapterSpec(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    with attached(base.model, spec) as model:
        before = task.mean_loss(model, base, data.train)
        train_round(model, base, train, list(data.train) * 6, 1, 1, 0)
        assert task.mean_loss(model, base, data.train) < before - 0.1


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", ["prompt-completion", "text-label"])
def test_every_kind_of_file_gives_the_same_examples(ending, name, tmp_path):
    task, tokenizer = find_task(TASKS.get(name, "causal-lm")), tiny_tokenizer()
    expected = encode_source(read_source(write(tmp_path / "a.jsonl", ROWS[name]), CONFIG), CONFIG, task, tokenizer)
    found = encode_source(read_source(write(tmp_path / f"b.{ending}", ROWS[name]), CONFIG), CONFIG, task, tokenizer)
    assert found.examples == expected.examples
    assert found.format == name


def test_a_text_file_holds_an_example_a_line(tmp_path):
    path = write(tmp_path / "a.txt", [{"text": "one"}, {"text": ""}, {"text": "two words"}])
    found = encode_source(read_source(path, CONFIG), CONFIG, find_task("causal-lm"), tiny_tokenizer())
    assert [tiny_tokenizer().decode(list(e.input_ids[:-1])) for e in found.examples] == ["one", "two words"]
    assert found.left_out["empty"] == 1


def test_a_folder_is_read_by_splits_and_holds_one_kind_of_file(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS["text"][:3])
    write(folder / "test.jsonl", ROWS["text"][3:])
    assert len(read_source(str(folder), CONFIG)) == 3
    assert len(read_source(str(folder), CONFIG.model_copy(update={"split": "test"}))) == N - 3
    write(folder / "more.csv", ROWS["text"])
    with pytest.raises(ValueError, match=r"files of one kind .* got \.csv, \.jsonl"):
        read_source(str(folder), CONFIG)


def test_a_hub_id_is_asked_of_the_hub(monkeypatch):
    from corolla.client.data import sources

    asked = []

    def hub(name, subset, split):
        asked.append((name, subset, split))
        return Dataset.from_list(ROWS["text"])

    monkeypatch.setattr(sources, "load_dataset", hub)
    config = CONFIG.model_copy(update={"subset": "main", "split": "test"})
    assert len(read_source("someone/some-data", config)) == N
    assert asked == [("someone/some-data", "main", "test")]


def test_without_the_hub_its_data_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"got someone/no-such-data: no such file, and the hub: "):
        read_source("someone/no-such-data", CONFIG)


def test_values_of_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nprice,1.10\nnothing,NA\n")
    rows = read_source(str(tmp_path / "a.csv"), CONFIG).rows
    assert list(rows["completion"]) == ["1.10", "NA"]


def test_what_teaches_nothing_is_counted_by_reason_in_training_and_held_out(tmp_path):
    rows = [*ROWS["prompt-completion"], {"prompt": "x", "completion": " "}, {"prompt": "y" * 300, "completion": "z"}]
    path = write(tmp_path / "a.jsonl", rows)
    config = CONFIG.model_copy(update={"train": path, "held_out": path})
    data = load_client_data(config, find_task("causal-lm"), tiny_tokenizer(), "a", 0, 1, 0, 256)
    one = {"too_long": 1.0, "empty": 1.0, "nothing_to_learn": 0.0}
    assert data.left_out == one | {f"held_out_{name}": n for name, n in one.items()}
    assert len(data.train) == len(data.held_out) == N
    same = write(tmp_path / "b.jsonl", [ROWS["preference"][0], {"prompt": "a", "chosen": "b", "rejected": "b"}])
    pairs = encode_source(read_source(same, CONFIG), CONFIG, find_task("preference"), tiny_tokenizer())
    assert pairs.left_out["nothing_to_learn"] == 1


def test_the_tasks_formats_decide_where_several_fit(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS["text-label"])
    source, tokenizer = read_source(path, CONFIG), tiny_tokenizer()
    assert encode_source(source, CONFIG, find_task("causal-lm"), tokenizer).format == "text"
    assert encode_source(source, CONFIG, find_task("classification"), tokenizer).format == "text-label"
    both = write(tmp_path / "b.jsonl", [row | {"prompt": "p", "completion": "c"} for row in ROWS["text"]])
    assert encode_source(read_source(both, CONFIG), CONFIG, find_task("causal-lm"), tokenizer).format != "text"
    chosen = CONFIG.model_copy(update={"format": "text"})
    assert encode_source(read_source(both, chosen), chosen, find_task("causal-lm"), tokenizer).format == "text"
    with pytest.raises(ValueError, match=r"data\.format must be one of text-label for this task, got 'text'"):
        encode_source(source, chosen, find_task("classification"), tokenizer)


def broken_files() -> list[tuple[str, str, str, str]]:
    """(what, ending, contents, message) from docs/data.md: the page is tested by this."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("## Broken files")[1]
    blocks = [block.split("```")[1] for block in page.split("\n### ")[1:]]
    titles = [block.splitlines()[0] for block in page.split("\n### ")[1:]]
    found = []
    for title, block in zip(titles, blocks, strict=True):
        ending, _, body = block.partition("\n")
        contents, _, message = body.partition("\n→ ")
        found.append((title, ending, contents + "\n", message.strip()))
    return found


@pytest.mark.parametrize(("what", "ending", "contents", "message"), broken_files(), ids=[b[0] for b in broken_files()])
def test_a_broken_file_is_refused_with_the_message_of_the_docs(what, ending, contents, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"data.{ending}").write_text(contents)
    name = "classification" if "label" in what else "preference" if "preference" in what else "causal-lm"
    config = CONFIG.model_copy(update={"labels": ("negative", "positive")})
    with pytest.raises(ValueError, match=r"must") as caught:
        read_and_encode(f"data.{ending}", config, name)
    assert str(caught.value) == message


def read_and_encode(path: str, config: DataConfig, task: str) -> None:
    encode_source(read_source(path, config), config, find_task(task), tiny_tokenizer())


def test_what_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, must be UTF-8, got invalid start byte"):
        read_source(str(tmp_path / "a.jsonl"), CONFIG)
