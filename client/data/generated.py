"""Short instruction tasks, each with one right answer, made by code from a seed.

The demo and the tests need data that is small, free and easy to check. A family is one kind of task: a
function that draws a prompt and its only right completion. Nothing is downloaded, and the same seed gives
the same rows on every machine.

A family's rows depend on the seed and the family alone, so asking for more families changes none of them.
The held-out rows are drawn first, so a larger training set leaves the questions of the test as they were.

    >>> train, held_out = generate_tasks(seed=1, families=["join_hyphens"], train=2, held_out=1)
    >>> [row["family"] for row in train + held_out]
    ['join_hyphens', 'join_hyphens', 'join_hyphens']
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, TypedDict

Draw = random.Random
Family = Callable[[Draw], tuple[str, str]]


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WORDS: Final = _split(
    "apple bird boat bread bridge candle cloud corn desk door feather field fish flag flower forest "
    "garden glass grass hammer harbor hill honey island lamp leaf lemon letter moon mountain music "
    "night ocean paper pencil piano rain river road rose salt sand shell ship silver sky snow spoon "
    "star stone storm summer table train tree valley water wheel wind winter wolf wood"
)
FIRST_NAMES: Final = _split(
    "Ada Ben Carla David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paul Rosa Sam Tom Vera"
)
LAST_NAMES: Final = _split(
    "Adams Baker Clark Davis Evans Fisher Green Hill King Lewis Moore Parker Reed Scott Turner Walker Ward Young"
)
CITIES: Final = _split(
    "Athens Berlin Cairo Dublin Geneva Lima London Madrid Milan Oslo Paris Prague Rome Seoul Tokyo Vienna"
)
MONTHS: Final = _split("January February March April May June July August September October November December")
UNITS: Final = {"km": ("m", 1000), "kg": ("g", 1000), "m": ("cm", 100)}

REPEATS_BEFORE_GIVING_UP: Final = 1000


class Row(TypedDict):
    """One task: what is asked, the only right answer, and the family that made it."""

    prompt: str
    completion: str
    family: str


def join_hyphens(draw: Draw) -> tuple[str, str]:
    """Three words written as one, with hyphens."""
    words = draw.sample(WORDS, 3)
    return f"Join with hyphens: {' '.join(words)}", "-".join(words)


def make_json(draw: Draw) -> tuple[str, str]:
    """A JSON object of one key and its value, both strings."""
    key, value = draw.sample(WORDS, 2)
    return f"As JSON: {key} is {value}", f'{{"{key}": "{value}"}}'


def swap_name(draw: Draw) -> tuple[str, str]:
    """A name with the family name first."""
    first, last = draw.choice(FIRST_NAMES), draw.choice(LAST_NAMES)
    return f"Family name first: {first} {last}", f"{last}, {first}"


def format_date(draw: Draw) -> tuple[str, str]:
    """An ISO date as day, name of the month, year."""
    day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1950, 2030)
    return f"Date in words: {year}-{month:02}-{day:02}", f"{day} {MONTHS[month - 1]} {year}"


def read_field(draw: Draw) -> tuple[str, str]:
    """The value of one of the two fields of a record."""
    every = {"name": draw.choice(FIRST_NAMES), "city": draw.choice(CITIES), "age": str(draw.randint(18, 90))}
    record = {field: every[field] for field in draw.sample(list(every), 2)}
    asked = draw.choice(list(record))
    fields = ", ".join(f"{field}={value}" for field, value in record.items())
    return f"{fields}. Give the {asked}", record[asked]


def convert_unit(draw: Draw) -> tuple[str, str]:
    """A length or a weight in the smaller unit, with the unit."""
    unit, amount = draw.choice(list(UNITS)), draw.randint(2, 99)
    smaller, factor = UNITS[unit]
    return f"Convert to {smaller}: {amount} {unit}", f"{amount * factor} {smaller}"


def pick_largest(draw: Draw) -> tuple[str, str]:
    """The largest of three numbers of two digits."""
    numbers = draw.sample(range(10, 100), 3)
    return f"Largest number: {', '.join(map(str, numbers))}", str(max(numbers))


def last_word(draw: Draw) -> tuple[str, str]:
    """The last of four words."""
    words = draw.sample(WORDS, 4)
    return f"Last word: {' '.join(words)}", words[-1]


FAMILIES: Final[dict[str, Family]] = {
    family.__name__: family
    for family in (
        join_hyphens,
        make_json,
        format_date,
        pick_largest,
        read_field,
        convert_unit,
        swap_name,
        last_word,
    )
}


def generate_tasks(seed: int, families: Sequence[str] | None, train: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """The (train, held-out) rows: `train` and `held_out` of each family, family after family in the order asked.

    No two rows share a prompt, within either list or across them. The rows of a family depend on (seed, family)
    alone. `families=None` asks for all of them, in the order of FAMILIES.

    Raises ValueError for an unknown or repeated family, for a negative count, and for a family that has too few
    different tasks.
    """
    names = list(FAMILIES) if families is None else list(families)
    _check_request(names, train, held_out)
    train_rows: list[Row] = []
    held_out_rows: list[Row] = []
    for name in names:
        rows = _draw_rows(seed, name, train + held_out)
        held_out_rows += rows[:held_out]
        train_rows += rows[held_out:]
    return train_rows, held_out_rows


def _check_request(names: Sequence[str], train: int, held_out: int) -> None:
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"families must be among {', '.join(FAMILIES)}, got {', '.join(map(repr, unknown))}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"each family can be asked for once, got {', '.join(repeated)} twice or more: remove the rest")
    if train < 0 or held_out < 0:
        raise ValueError(f"train and held_out must be 0 or more, got train={train}, held_out={held_out}")


def _draw_rows(seed: int, name: str, count: int) -> list[Row]:
    """`count` rows of one family with different prompts, in the order drawn.

    The seed is a string: Random hashes it with SHA-512, which is the same in every process, as hash() is not.
    """
    draw = random.Random(f"{seed}/{name}")
    answers: dict[str, str] = {}
    repeats = 0
    while len(answers) < count:
        prompt, completion = FAMILIES[name](draw)
        repeats = repeats + 1 if prompt in answers else 0
        if repeats == REPEATS_BEFORE_GIVING_UP:
            raise ValueError(
                f"family {name} must give {count} different tasks, got {len(answers)} before {repeats} repeats "
                "in a row: ask for fewer train or held-out rows, or leave the family out"
            )
        answers.setdefault(prompt, completion)
    return [Row(prompt=prompt, completion=completion, family=name) for prompt, completion in answers.items()]
