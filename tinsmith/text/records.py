"""Parse chat records of several formats into `Conversation`, or reject them with a reason.

The repr of `Conversation`, `Message` and `Call` is the key of the train/validation split: renaming
a class or a field, or reordering fields, would move samples between the two.
"""

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


ANSWER_FIELDS = ("answer", "output", "final")
"""Fields that may hold the answer to a question: the worked solution before the bare result."""
MAX_JSON_DEPTH = 64
"""Largest nesting depth of JSON in tools and arguments."""


class BadRecord(UserError):
    """A chat record that cannot be used. The message is a short reason."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One tool call: the tool's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message. Only an assistant message has `reasoning` and `calls`."""

    role: Role
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the JSON descriptions of the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def prompt(self) -> "Conversation":
        """Return the conversation without its last assistant message: the prompt of that answer."""
        last = self.messages[-1:]
        prompt_messages = (
            self.messages[:-1] if last and last[0].role == "assistant" else self.messages
        )
        return Conversation(messages=prompt_messages, tools=self.tools)


def parse_conversation(record: Any, *, answered: bool = True) -> Conversation:
    """Read `messages` (OpenAI), `conversations` (ShareGPT, MiniMind), `instruction` (Alpaca), or a
    `question` or `prompt` with its answer in one of `ANSWER_FIELDS`.

    Tools come from the record's `tools` or those of its system message, as a list or as JSON text.
    A blank system message is dropped. With `answered`, an assistant message is required; otherwise
    the record is a prompt. Raise BadRecord with the reason: a missing field, a wrong type, roles
    out of order, empty content.
    """
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    items = _raw_messages(record, answered)
    tools = _tools(record, items)
    messages = [_message(item, f"message {index + 1}") for index, item in enumerate(items)]
    system = record.get("system")
    if system and (not messages or messages[0].role != "system"):
        messages.insert(0, Message(role="system", content=_text(system, "`system`")))
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages.pop(0)
    _check_order(messages)
    for index, message in enumerate(messages):
        if not message.content.strip() and message.role != "tool" and not message.calls:
            raise BadRecord(f"message {index + 1}: empty content")
    if answered and all(message.role != "assistant" for message in messages):
        raise BadRecord("no assistant turn")
    return Conversation(messages=tuple(messages), tools=tuple(tools))


def _raw_messages(record: dict[str, Any], answered: bool) -> list[dict[str, Any]]:
    """Return the record's messages as role/content objects, not yet validated."""
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
    """Join a content given in parts: texts (OpenAI), reasoning and calls (LLaMA-Factory)."""
    parts = item.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return item
    by_type: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        by_type.setdefault(str(part.get("type")), []).append(part.get("text", part.get("value")))
    if len(by_type) > 3 or any(
        not isinstance(text, str) for texts in by_type.values() for text in texts
    ):
        return item
    message = item | {"content": "".join(by_type["text"])}
    message |= {"reasoning_content": "".join(by_type["reasoning"])} if by_type["reasoning"] else {}
    return message | ({"tool_calls": by_type["tool_call"]} if by_type["tool_call"] else {})


def _from_alpaca(record: dict[str, Any], answered: bool) -> list[dict[str, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise BadRecord("`history` is not a list of pairs")
    turns: list[Any] = [text for pair in history for text in pair]
    parts = [_text(record[key], f"`{key}`") for key in ("instruction", "input") if record.get(key)]
    turns.append("\n\n".join(parts))
    if "output" in record:
        turns.append(record["output"])
    elif answered:
        raise BadRecord("`output` is missing")
    return [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(turns)
    ]


def _from_question(record: dict[str, Any], field: str, answered: bool) -> list[dict[str, Any]]:
    items = [{"role": "user", "content": _text(record[field], f"`{field}`")}]
    answer = answer_of(record, ANSWER_FIELDS)
    if answer is None and answered:
        raise BadRecord(f"no text in any of {', '.join(f'`{key}`' for key in ANSWER_FIELDS)}")
    return items if answer is None else [*items, {"role": "assistant", "content": answer}]


def answer_of(record: dict[str, Any], fields: Sequence[str]) -> str | None:
    """Return the first of these fields that holds a text, a number or a list of these, as text."""
    for field in fields:
        value = record.get(field)
        texts = [_as_text(item) for item in (value if isinstance(value, list) else [value])]
        if texts and None not in texts:
            return ", ".join(text for text in texts if text is not None)
    return None


def _as_text(value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if isinstance(value, str) else str(value) if is_number else None


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
    return _check_json(value, where)


def _calls(value: Any, where: str) -> tuple[Call, ...]:
    calls = _as_list(_decode_json(value, f"{where}: `tool_calls`"))
    return tuple(_call(item, f"{where}: a tool call") for item in calls)


def _call(item: Any, where: str) -> Call:
    item = _decode_json(item, where)
    inner = (item.get("function") or item) if isinstance(item, dict) else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRecord(f"{where} has no name")
    arguments = _decode_json(inner.get("arguments"), f"{where}'s arguments")
    if not isinstance(arguments, dict | None):
        raise BadRecord(f"{where}'s arguments are not a JSON object")
    return Call(name=_check_json(inner["name"], where), arguments=arguments or {})


def _tools(record: dict[str, Any], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    raw = record.get("tools")
    if not raw and items and items[0].get("role") in ("system", "developer"):
        raw = items[0].get("tools")
    tools = _as_list(_decode_json(raw, "`tools`"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("`tools` is not a list of objects")
    return tools


def _decode_json(value: Any, where: str) -> Any:
    """Decode a value that may be JSON text. Empty text gives None."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise BadRecord(f"{where}: not valid JSON") from None
    return _check_json(value, where)


def _check_json(value: Any, where: str, depth: int = 0) -> Any:
    """Return the value after checking that it is JSON of limited depth without lone surrogates."""
    if depth > MAX_JSON_DEPTH:
        raise BadRecord(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{where} contains a lone surrogate") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, where, depth + 1)
            if not isinstance(key, str):
                raise BadRecord(f"{where}: a key is not text")
            _check_json(key, where)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, where, depth + 1)
    elif not isinstance(value, int | float | None):
        raise BadRecord(f"{where}: a {type(value).__name__} is not JSON")
    return value


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_order(messages: list[Message]) -> None:
    """Check the order: system first, user and assistant in turn, tool results after tool calls."""
    allowed: tuple[str, ...] = ("system", "user")
    for index, message in enumerate(messages):
        if message.role not in allowed:
            expected = " or ".join(allowed)
            raise BadRecord(f"message {index + 1}: role {message.role}, expected {expected}")
        if message.role == "assistant":
            allowed = ("tool",) if message.calls else ("user",)
        else:
            next_roles = {
                "system": ("user",),
                "user": ("assistant",),
                "tool": ("tool", "assistant"),
            }
            allowed = next_roles[message.role]
    if not messages or messages[-1].role == "system":
        raise BadRecord("has no message of a user or an assistant")
