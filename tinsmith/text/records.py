"""Chat records as people write them, made into one form, or refused with a reason."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tinsmith.core.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


ANSWERS = ("answer", "output", "final")
"""Fields that hold what is said to a question: worked out, if it is, before the bare result."""
DEEPEST = 64
"""Levels of nesting in tools and in arguments."""


class BadRecord(UserError):
    """A chat record that cannot be used; its text is a short reason."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a tool: its name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one role says. Only an assistant has `reasoning` and `calls`."""

    role: Role
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tools that may be called, each as the object that describes it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def prompt(self) -> "Conversation":
        """The same without what the assistant says last: what an answer is to be generated for."""
        last = self.messages[-1:]
        kept = self.messages[:-1] if last and last[0].role == "assistant" else self.messages
        return Conversation(messages=kept, tools=self.tools)


def normalise(record: Any, *, answered: bool = True) -> Conversation:
    """Read `messages` (OpenAI), `conversations` (ShareGPT, MiniMind), `instruction` (Alpaca), or a
    `question` or `prompt` with its answer in one of `ANSWERS`.

    Tools come from the record's `tools` or those of its system message, as a list or as JSON text.
    A blank system message is left out. With `answered` the assistant must speak; without, the
    record is a prompt and need not be answered. BadRecord says what is wrong: a missing field, a
    wrong type, roles out of order, nothing said.
    """
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    items = _items(record, answered)
    tools = _tools(record, items)
    messages = [_message(item, f"message {place + 1}") for place, item in enumerate(items)]
    system = record.get("system")
    if system and (not messages or messages[0].role != "system"):
        messages.insert(0, Message(role="system", content=_text(system, "`system`")))
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages.pop(0)
    _check_order(messages)
    for place, message in enumerate(messages):
        if not message.content.strip() and message.role != "tool" and not message.calls:
            raise BadRecord(f"message {place + 1}: empty content")
    if answered and all(message.role != "assistant" for message in messages):
        raise BadRecord("no assistant turn")
    return Conversation(messages=tuple(messages), tools=tuple(tools))


def _items(record: dict[str, Any], answered: bool) -> list[dict[str, Any]]:
    """The record's messages as role/content objects, not yet judged."""
    for key in ("messages", "conversations"):
        if key in record:
            items = record[key]
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise BadRecord(f"`{key}` is not a list of objects")
            return [
                _from_sharegpt(item) if item.get("from") is not None else _from_parts(item)
                for item in items
            ]
    if "instruction" in record:
        return _from_alpaca(record, answered)
    for key in ("question", "prompt"):
        if key in record:
            return _from_question(record, key, answered)
    raise BadRecord("has none of `messages`, `conversations`, `instruction`, `question`, `prompt`")


def _from_sharegpt(item: dict[str, Any]) -> dict[str, Any]:
    renamed = {key: value for key, value in item.items() if key not in ("from", "value")}
    renamed["role"] = item["from"]
    if item["from"] == "function_call":
        return renamed | {"content": "", "tool_calls": item.get("value")}
    return renamed | ({"content": item["value"]} if "value" in item else {})


def _from_parts(item: dict[str, Any]) -> dict[str, Any]:
    """Join a content in parts: texts (OpenAI), reasoning and calls (LLaMA-Factory)."""
    parts = item.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return item
    found: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        found.setdefault(str(part.get("type")), []).append(part.get("text", part.get("value")))
    if len(found) > 3 or any(not isinstance(one, str) for many in found.values() for one in many):
        return item
    whole = item | {"content": "".join(found["text"])}
    whole |= {"reasoning_content": "".join(found["reasoning"])} if found["reasoning"] else {}
    return whole | ({"tool_calls": found["tool_call"]} if found["tool_call"] else {})


def _from_alpaca(record: dict[str, Any], answered: bool) -> list[dict[str, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise BadRecord("`history` is not a list of pairs")
    said: list[Any] = [text for pair in history for text in pair]
    parts = [_text(record[key], f"`{key}`") for key in ("instruction", "input") if record.get(key)]
    said.append("\n\n".join(parts))
    if "output" in record:
        said.append(record["output"])
    elif answered:
        raise BadRecord("`output` is missing")
    return [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(said)
    ]


def _from_question(record: dict[str, Any], asks: str, answered: bool) -> list[dict[str, Any]]:
    items = [{"role": "user", "content": _text(record[asks], f"`{asks}`")}]
    said = answer_of(record, ANSWERS)
    if said is None and answered:
        raise BadRecord(f"no text in any of {', '.join(f'`{key}`' for key in ANSWERS)}")
    return items if said is None else [*items, {"role": "assistant", "content": said}]


def answer_of(record: dict[str, Any], fields: Sequence[str]) -> str | None:
    """The first of these fields that holds a text or a number, as text."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    return None


def _message(item: dict[str, Any], where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecord(
            f"{where}: `role` is missing" if role is None else f"{where}: unknown role {role!r}"
        )
    calls = _calls(item.get("tool_calls"), where) if _ROLES[role] == "assistant" else ()
    content = item.get("content")
    if content is None and not calls:
        raise BadRecord(f"{where}: `content` is missing")
    reasoning = item.get("reasoning_content") if _ROLES[role] == "assistant" else None
    return Message(
        role=_ROLES[role],
        content=_text("" if content is None else content, f"{where}: `content`"),
        reasoning=_text(reasoning or "", f"{where}: `reasoning_content`"),
        calls=calls,
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where} is not text")
    return _json(value, where)


def _calls(value: Any, where: str) -> tuple[Call, ...]:
    calls = _listed(_parsed(value, f"{where}: `tool_calls`"))
    return tuple(_call(item, f"{where}: a tool call") for item in calls)


def _call(item: Any, where: str) -> Call:
    item = _parsed(item, where)
    inner = (item.get("function") or item) if isinstance(item, dict) else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRecord(f"{where} has no name")
    arguments = _parsed(inner.get("arguments"), f"{where}'s arguments")
    if not isinstance(arguments, dict | None):
        raise BadRecord(f"{where}'s arguments are not a JSON object")
    return Call(name=_json(inner["name"], where), arguments=arguments or {})


def _tools(record: dict[str, Any], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given = record.get("tools")
    if not given and items and items[0].get("role") in ("system", "developer"):
        given = items[0].get("tools")
    tools = _listed(_parsed(given, "`tools`"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("`tools` is not a list of objects")
    return tools


def _parsed(value: Any, where: str) -> Any:
    """A value that may have been written as JSON text; None for empty text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise BadRecord(f"{where}: not valid JSON") from None
    return _json(value, where)


def _json(value: Any, where: str, depth: int = 0) -> Any:
    """The value itself, once it is seen to be JSON of sane depth whose texts can be written."""
    if depth > DEEPEST:
        raise BadRecord(f"{where}: nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{where} has half a character (a lone surrogate)") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _json(item, where, depth + 1)
            if not isinstance(key, str):
                raise BadRecord(f"{where}: a key is not text")
            _json(key, where)
    elif isinstance(value, list):
        for item in value:
            _json(item, where, depth + 1)
    elif not isinstance(value, int | float | None):
        raise BadRecord(f"{where}: a {type(value).__name__} is not JSON")
    return value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_order(messages: list[Message]) -> None:
    """System first only; user and assistant in turn; results of tools after calls of tools."""
    allowed: tuple[str, ...] = ("system", "user")
    for place, message in enumerate(messages):
        if message.role not in allowed:
            expected = " or ".join(allowed)
            raise BadRecord(f"message {place + 1}: {message.role} where {expected} should speak")
        if message.role == "assistant":
            allowed = ("tool",) if message.calls else ("user",)
        else:
            after = {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}
            allowed = after[message.role]
    if not messages or messages[-1].role == "system":
        raise BadRecord("nobody says anything")
