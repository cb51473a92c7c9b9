"""The made tasks are the same everywhere, never overlap, and have the right answers."""

import datetime
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys

import pytest

from corolla.client.data import generated as tasks
from corolla.client.data.generated import FAMILIES, Row, generate_tasks

GRAMS_OR_CENTIMETRES = {"km": 100_000, "m": 100, "cm": 1, "kg": 1000, "g": 1}


def check_join_hyphens(asked: str, answer: str) -> bool:
    return answer.count("-") == 2 and answer.replace("-", " ") == asked


def check_make_json(asked: str, answer: str) -> bool:
    [(key, value)] = json.loads(answer).items()
    return asked == f"{key} is {value}"


def check_swap_name(asked: str, answer: str) -> bool:
    last, first = answer.split(", ")
    return asked == f"{first} {last}"


def check_format_date(asked: str, answer: str) -> bool:
    day = datetime.datetime.strptime(answer, "%d %B %Y").date()
    return day.isoformat() == asked and not answer.startswith("0")


def check_pick_largest(asked: str, answer: str) -> bool:
    numbers = [int(number) for number in asked.split(", ")]
    return int(answer) in numbers and sum(number > int(answer) for number in numbers) == 0


def check_last_word(asked: str, answer: str) -> bool:
    return re.fullmatch(r"(\w+ ){3}" + answer, asked) is not None


AFTER_COLON = {
    "join_hyphens": check_join_hyphens,
    "make_json": check_make_json,
    "swap_name": check_swap_name,
    "format_date": check_format_date,
    "pick_largest": check_pick_largest,
    "last_word": check_last_word,
}


def check_read_field(prompt: str, answer: str) -> bool:
    record, asked = prompt.split(". Give the ")
    return f",{asked}={answer}," in f",{record},".replace(", ", ",")


def check_convert_unit(prompt: str, answer: str) -> bool:
    wanted, amount, unit = re.fullmatch(r"Convert to (\w+): (\d+) (\w+)", prompt).groups()
    number, smaller = answer.split()
    same = int(number) * GRAMS_OR_CENTIMETRES[smaller] == int(amount) * GRAMS_OR_CENTIMETRES[unit]
    return same and smaller == wanted


WHOLE_PROMPT = {"read_field": check_read_field, "convert_unit": check_convert_unit}


def is_right(row: Row) -> bool:
    """Whether the completion follows from the prompt, found by another way than the generator's."""
    if row["family"] in WHOLE_PROMPT:
        return WHOLE_PROMPT[row["family"]](row["prompt"], row["completion"])
    return AFTER_COLON[row["family"]](row["prompt"].split(": ", 1)[1], row["completion"])


def fingerprint(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_is_right_and_clean(family):
    train, held_out = generate_tasks(3, [family], train=200, held_out=50)
    for row in train + held_out:
        assert row["family"] == family
        assert is_right(row), row
        assert row["completion"] == row["completion"].strip() != ""


@pytest.mark.parametrize("family", FAMILIES)
def test_check_rejects_the_answer_of_another_prompt(family):
    train, _ = generate_tasks(3, [family], train=50, held_out=0)
    for row, other in itertools.pairwise(train):
        if row["completion"] != other["completion"]:
            assert not is_right({**row, "completion": other["completion"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_depends_on_the_prompt(family):
    train, _ = generate_tasks(3, [family], train=50, held_out=0)
    answers = [row["completion"] for row in train]
    assert max(answers.count(answer) for answer in answers) <= 10


def test_every_prompt_is_there_once():
    train, held_out = generate_tasks(0, None, train=150, held_out=50)
    prompts = [row["prompt"] for row in train + held_out]
    assert len(prompts) == len(set(prompts)) == len(FAMILIES) * 200


def test_counts_are_per_family_and_order_is_the_one_asked():
    asked = ["last_word", "make_json"]
    train, held_out = generate_tasks(0, asked, train=3, held_out=2)
    assert [row["family"] for row in train] == ["last_word"] * 3 + ["make_json"] * 3
    assert [row["family"] for row in held_out] == ["last_word"] * 2 + ["make_json"] * 2


def test_a_family_does_not_depend_on_the_others_asked_for():
    everything = generate_tasks(5, None, train=10, held_out=5)
    alone = generate_tasks(5, ["convert_unit"], train=10, held_out=5)
    for rows, own in zip(everything, alone, strict=True):
        assert [row for row in rows if row["family"] == "convert_unit"] == own


def test_more_training_rows_keep_the_held_out_ones():
    few, few_held_out = generate_tasks(5, None, train=2, held_out=5)
    many, many_held_out = generate_tasks(5, None, train=20, held_out=5)
    assert few_held_out == many_held_out
    assert all(row in many for row in few)


def test_same_seed_same_rows_in_another_process():
    code = (
        "import hashlib, json; from corolla.client.data.generated import generate_tasks; "
        "print(hashlib.sha256(json.dumps(generate_tasks(7, None, 20, 5)).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(generate_tasks(7, None, 20, 5))


def test_another_seed_gives_other_rows():
    assert generate_tasks(1, None, 20, 5) != generate_tasks(2, None, 20, 5)


def test_does_not_touch_the_process_wide_random_state():
    before = random.getstate()
    generate_tasks(1, None, 5, 5)
    assert random.getstate() == before


def test_unknown_family_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"among join_hyphens, make_json.*got 'sort_words'"):
        generate_tasks(1, ["make_json", "sort_words"], 1, 1)


def test_repeated_family_is_refused():
    with pytest.raises(ValueError, match="once, got make_json"):
        generate_tasks(1, ["make_json", "make_json"], 1, 1)


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="0 or more, got train=-1"):
        generate_tasks(1, None, -1, 1)


def test_family_too_small_says_which_how_many_and_the_cure(monkeypatch):
    monkeypatch.setitem(tasks.FAMILIES, "name_a_digit", lambda draw: (str(draw.randrange(10)), "digit"))
    train, held_out = generate_tasks(1, ["name_a_digit"], 7, 3)
    assert len(train) + len(held_out) == 10
    with pytest.raises(ValueError, match=r"name_a_digit must give 11 different tasks, got 10.*ask for fewer"):
        generate_tasks(1, ["name_a_digit"], 7, 4)
