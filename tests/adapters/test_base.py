"""Bases: found, identified by their bytes, opened once."""

import json
import shutil

import pytest

from corolla.adapters import base_hash, find_base, open_base, open_tokenizer
from tests.tiny import write_tiny_model


def test_one_base_per_process_whatever_asks(tiny_folder):
    assert open_base(str(tiny_folder), device="cpu") is open_base(str(tiny_folder), device="cpu")


def test_the_hash_is_of_the_bytes_not_of_the_place_or_precision(tiny_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, copy)
    assert base_hash(find_base(str(copy))) == base_hash(find_base(str(tiny_folder)))
    assert open_base(str(copy), "bfloat16", "cpu").hash == base_hash(find_base(str(tiny_folder)))
    (copy / "README.md").write_text("no part of the model")
    assert base_hash(find_base(str(copy))) == base_hash(find_base(str(tiny_folder)))
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert base_hash(find_base(str(other))) != base_hash(find_base(str(tiny_folder)))


def test_the_hash_follows_a_changed_file(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    first = base_hash(find_base(str(copy)))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert base_hash(find_base(str(copy))) != first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such path"),
        ("/nowhere/model.gguf", "no such path"),
        ("nobody/nothing", "local folder"),
    ],
)
def test_a_base_that_is_not_there_names_the_cure(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_base(name)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        find_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="weights"):
        base_hash(find_base(str(tmp_path)))


def test_a_tokenizer_that_was_mended_is_read_again(tiny_folder, tmp_path):
    """A worker lasts: the hash of a base whose files were replaced is the new one, and so must be its tokenizer."""
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    right = (folder / "tokenizer.json").read_text()
    found = json.loads(right)
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    wrong = open_tokenizer(find_base(str(folder)))
    (folder / "tokenizer.json").write_text(right)
    mended = open_tokenizer(find_base(str(folder)))
    assert base_hash(find_base(str(folder))) == base_hash(find_base(str(tiny_folder)))
    assert mended("ab")["input_ids"] == wrong("ba")["input_ids"] != wrong("ab")["input_ids"]
    assert open_tokenizer(find_base(str(folder))) is mended
