"""Rows of data, wherever they are: a file, a folder or the hub, read by `datasets`; each row knows its place."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset

from corolla.client.config import DataConfig

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Ending -> what reads it. A .txt holds one example a line; all values of .csv and .tsv are text."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Rows of `name`, in their order. `positions` are where they stand in it, if these are some of its rows."""

    name: str
    rows: Dataset
    positions: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Source":
        """Some of the rows."""
        before = self.positions
        positions = tuple(before[i] if before else i for i in indices)
        return replace(self, rows=self.rows.select(list(indices)), positions=positions)

    def place(self, index: int) -> str:
        """Where the row is, for a message: the line of the file where it has lines."""
        position = self.positions[index] if self.positions else index
        line = next(islice(self._lines, position, None), None) if self._has_lines else None
        return f"{self.name}, line {line}" if line else f"{self.name}, row {position + 1}"

    @cached_property
    def _has_lines(self) -> bool:
        path = Path(self.name).expanduser()
        return path.suffix in (".jsonl", ".txt", ".csv", ".tsv") and path.is_file()

    @property
    def _lines(self) -> Iterator[int]:
        """The line on which every row ends."""
        path = Path(self.name).expanduser()
        with path.open(encoding="utf-8", newline="") as file:
            if KINDS[path.suffix] == "csv":
                reader = csv.reader(file, delimiter=_delimiter(path))
                next(reader, None)
                yield from (reader.line_num for row in reader if row)
            else:
                keep_blank = path.suffix == ".txt"
                yield from (number for number, line in enumerate(file, 1) if keep_blank or line.strip())


def read_source(name: str, config: DataConfig) -> Source:
    """The rows of a file, a folder or a hub id. Raises FileNotFoundError, and ValueError for what cannot be read."""
    path = Path(name).expanduser()
    if path.is_dir():
        kind, files = _files_in(path)
        rows = _load(name, kind, config, data_dir=str(path), **_options(kind, files))
    elif path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(f"data must be in a file of {', '.join(KINDS)}, got {name}: convert or rename it")
        _require_rows(name, path)
        rows = _load(name, KINDS[path.suffix], config, data_files=str(path), **_options(KINDS[path.suffix], [path]))
    elif path.suffix in KINDS or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"data needs a file, a folder or a dataset of the hub, got {name}: no such file")
    else:
        rows = _load_from_hub(name, config)
    if not len(rows):
        raise ValueError(f"{name} must have at least one row, got none")
    return Source(name, rows)


def _files_in(folder: Path) -> tuple[str, list[Path]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS)
    endings = sorted({path.suffix for path in files})
    if len(endings) != 1:
        raise ValueError(
            f"{folder} must hold data files of one kind ({', '.join(KINDS)}), got {', '.join(endings) or 'none'}: "
            "name one file, or put the others elsewhere"
        )
    return KINDS[endings[0]], files


def _options(kind: str, files: Sequence[Path]) -> dict[str, Any]:
    """CSV is read as text: "1.10" and "NA" stay what they are."""
    if kind != "csv":
        return {}
    delimiter = _delimiter(files[0])
    with files[0].open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file, delimiter=delimiter), [])
    features = Features({column: Value("string") for column in columns})
    return {"delimiter": delimiter, "keep_default_na": False, "features": features}


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _load(name: str, kind: str, config: DataConfig, **options: Any) -> Dataset:
    try:
        return load_dataset(kind, split=config.split, **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        _explain(name)
        cause = error.__cause__ or error
        raise ValueError(f"{name} could not be read: {cause}".replace("\n", " ")) from error


def _load_from_hub(name: str, config: DataConfig) -> Dataset:
    try:
        return load_dataset(name, config.subset, split=config.split)
    except Exception as error:
        raise FileNotFoundError(
            f"data needs a file, a folder or a dataset of the hub, got {name}: no such file, and the hub: {error}"
        ) from error


def _require_rows(name: str, path: Path) -> None:
    """Raises ValueError for an empty file, or the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file if KINDS[path.suffix] != "parquet" else (), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}, line {number}, must be UTF-8, got {error.reason}: save it as UTF-8"
                ) from error
    if not path.stat().st_size:
        raise ValueError(f"{name} must have at least one row, got an empty file")


def _explain(name: str) -> None:
    """Raises ValueError, with the line, for what a reader stumbled over, if it is found."""
    path = Path(name).expanduser()
    if not path.is_file() or path.suffix == ".parquet":
        return
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            _explain_json_lines(name, file)
    elif path.suffix == ".json":
        _explain_json(name, path.read_text(encoding="utf-8"))
    elif KINDS[path.suffix] == "csv":
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(path))
            columns = next(reader, [])
            for row in reader:
                if row and len(row) != len(columns):
                    raise ValueError(
                        f"{name}, line {reader.line_num}, must have {len(columns)} values ({', '.join(columns)}), got "
                        f"{len(row)}: put values with a {_delimiter(path)!r} in quotes"
                    )


def _explain_json_lines(name: str, lines: Iterator[str]) -> None:
    seen: dict[str, tuple[type, int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}, must be JSON, got {line.strip()[:60]!r}: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name}, line {number}, must be an object with columns, got {line.strip()[:60]!r}")
        _require_one_kind(f"{name}, line {number},", row, number, seen)


def _explain_json(name: str, text: str) -> None:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}, must be JSON: {error.msg}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} must be a list of objects with columns, got {text.strip()[:60]!r}: write one list")
    seen: dict[str, tuple[type, int]] = {}
    for number, row in enumerate(rows, 1):
        _require_one_kind(f"{name}, row {number},", row, number, seen)


def _require_one_kind(place: str, row: dict[str, Any], number: int, seen: dict[str, tuple[type, int]]) -> None:
    """Raises ValueError for a value of another type than the rows before have in its column."""
    for column, value in row.items():
        kind, first = seen.setdefault(column, (type(value), number)) if value is not None else (type(None), 0)
        if value is not None and type(value) is not kind:
            raise ValueError(
                f"{place} must have a {kind.__name__} in {column!r} as row {first} has, got {value!r}: use one type"
            )
