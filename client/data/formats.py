"""The formats that rows come in, told by their columns, and what each becomes for the tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corolla.client.config import DataConfig
from corolla.client.tasks.task import Row


class RowError(ValueError):
    """A row that is not what its format says: "must …, got …: cure"; who knows the place puts it before."""


@dataclass(frozen=True)
class Format:
    """One format. `kind` is what a task sees of it (`Task.formats`).

    `columns(config)` are those that tell it, each one or several that will do; `read(config, row)` is the row under
    the names that tasks' `encode` reads, None for one that is empty. Raises RowError.
    """

    kind: str
    columns: Callable[[DataConfig], Sequence[Sequence[str]]]
    read: Callable[[DataConfig, Row], Row | None]

    def fits(self, names: Sequence[str], config: DataConfig) -> bool:
        """Whether rows with these columns may be of it."""
        return all(any(name in names for name in some) for some in self.columns(config))


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"must have a text in {name!r}, got {value!r}: write one, or take the row out")
    return str(value)


def _first(row: Row, *names: str) -> str:
    return next((name for name in names if row.get(name) is not None), names[0])


def _pair(config: DataConfig, row: Row) -> Row | None:
    prompt, completion = _text(row, config.prompt), _text(row, config.completion)
    return {"prompt": prompt, "completion": completion} if completion.strip() else None


def _instruction(config: DataConfig, row: Row) -> Row | None:
    given = _text(row, "input") if row.get("input") is not None else ""
    prompt, output = _text(row, "instruction"), _text(row, "output")
    return (
        {"prompt": f"{prompt}\n\n{given}" if given.strip() else prompt, "completion": output}
        if output.strip()
        else None
    )


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks, in ShareGPT's terms and in the chat templates'."""


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RowError(f"must have a list of messages in {name!r}, got {value!r}")
    messages = []
    for message in value:
        found = message if isinstance(message, dict) else {}
        role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise RowError(
                f"must have messages of a role ({', '.join(ROLES)}) and a content in {name!r}, got {message!r}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _chat(config: DataConfig, row: Row) -> Row | None:
    name = _first(row, "messages", "conversations")
    messages = _messages(row.get(name), name)
    if not messages:
        return None
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"must have an assistant's message in {name!r}, got {[m['role'] for m in messages]}")
    return {"messages": messages}


def _preference(config: DataConfig, row: Row) -> Row | None:
    if isinstance(row.get("chosen"), list):
        return _preference_chat(row)
    prompt, chosen, rejected = _text(row, config.prompt), _text(row, "chosen"), _text(row, "rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} if chosen.strip() and rejected.strip() else None


def _preference_chat(row: Row) -> Row | None:
    """One question and two answers; the question may stand in "prompt" or before both answers."""
    given = _messages(row["prompt"], "prompt") if isinstance(row.get("prompt"), list) else []
    sides = [given + _messages(row.get(name), name) for name in ("chosen", "rejected")]
    roles = {tuple(message["role"] for message in side) for side in sides}
    if roles != {("user", "assistant")} or sides[0][0] != sides[1][0]:
        raise RowError(
            f"must have one question and an answer to it in 'chosen' and in 'rejected', got {sorted(roles)}: "
            "use prompt, chosen and rejected as texts"
        )
    return {"prompt": sides[0][0]["content"], "chosen": sides[0][1]["content"], "rejected": sides[1][1]["content"]}


def _choice(config: DataConfig, row: Row) -> Row | None:
    name = _first(row, config.prompt, "question")
    prompt, choices, answer = row.get(name), row.get("choices"), row.get("answer")
    if not isinstance(prompt, str) or not prompt:
        raise RowError(f"must have a question in {name!r}, got {prompt!r}: set data.prompt")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise RowError(f"must have two or more texts in 'choices', got {choices!r}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise RowError(f"must have the right choice's index, from 0, in 'answer', got {answer!r}")
    return {"prompt": prompt, "choices": choices, "answer": answer}


def _labelled(config: DataConfig, row: Row) -> Row | None:
    text, label = _text(row, "text"), _text(row, "label")
    return {"text": text, "label": label} if text.strip() else None


def _plain(config: DataConfig, row: Row) -> Row | None:
    text = _text(row, "text")
    return {"text": text} if text.strip() else None


CHOICE = "multiple-choice"
"""Rows that are evaluated by likelihood, whatever the task."""

FORMATS: Mapping[str, Format] = {
    "prompt-completion": Format("prompt-completion", lambda c: ((c.prompt,), (c.completion,)), _pair),
    "instruction": Format("prompt-completion", lambda c: (("instruction",), ("output",)), _instruction),
    "chat": Format("chat", lambda c: (("messages", "conversations"),), _chat),
    "preference": Format("preference", lambda c: (("chosen",), ("rejected",)), _preference),
    CHOICE: Format(CHOICE, lambda c: ((c.prompt, "question"), ("choices",), ("answer",)), _choice),
    "text-label": Format("text-label", lambda c: (("text",), ("label",)), _labelled),
    "text": Format("text", lambda c: (("text",),), _plain),
}
"""By name, those with more columns before those with fewer."""


def recognise(name: str, columns: Sequence[str], config: DataConfig, kinds: Sequence[str]) -> str:
    """The format of rows with these columns, among those whose kind is in `kinds`. Raises ValueError for none."""
    known = [key for key, found in FORMATS.items() if found.kind in kinds]
    if config.format != "auto":
        if config.format not in known:
            raise ValueError(f"data.format must be one of {', '.join(known)} for this task, got {config.format!r}")
        known = [config.format]
    fitting = [key for key in known if FORMATS[key].fits(columns, config)]
    if fitting:
        return fitting[0]
    others = [key for key, found in FORMATS.items() if found.fits(columns, config)]
    hint = f" (they are of {others[0]}: set train.task)" if others else ""
    needed = "; ".join(f"{key}: {_columns(FORMATS[key], config)}" for key in known)
    raise ValueError(
        f"{name} must have the columns of its format ({needed}), got {', '.join(columns)}{hint}: rename them, or set "
        "data.prompt and data.completion"
    )


def _columns(found: Format, config: DataConfig) -> str:
    return ", ".join(" or ".join(dict.fromkeys(some)) for some in found.columns(config))


def read_row(format_name: str, config: DataConfig, row: Row) -> Row | None:
    """The row for a task's `encode`, with its group; None for an empty one. Raises RowError."""
    found = FORMATS[format_name].read(config, row)
    return None if found is None else {**found, "group": str(row.get(config.group) or row.get("group") or "")}
