"""Parse chat records of several formats into `Conversation`, or reject them with a reason.

The repr of `Conversation`, `Message` and `Call` is the key of the train/validation split: renaming
a class or a field, or reordering fields, would move samples between the two.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tinsmith.text.fields import BadRecord, Fields, as_fields, check_json, decode_json, plain

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "environment": "tool",
}

ANSWER_FIELDS = ("answer", "output", "final", "response", "completion")
"""Fields that may hold the answer to a question: the worked solution before the bare result."""
QUESTION_FIELDS = ("instruction", "question", "prompt", "query")
"""Fields that may hold the question of a record without messages."""
_EMPTY = ("", [], {})


@dataclass(frozen=True, kw_only=True)
class Call:
    """One tool call: the tool's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message. Only an assistant message has `reasoning` and `calls`. The loss leaves out an
    assistant message that is not `trained`; this does not enter the repr.
    """

    role: Role
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    trained: bool = field(default=True, repr=False)


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
    """Read `messages` (OpenAI), `conversations` (ShareGPT, MiniMind), or one of `QUESTION_FIELDS`
    (Alpaca and others) with its answer in one of `ANSWER_FIELDS`.

    Tools come from the record's `tools` or `functions`, or the tools of its system message, as a
    list or as JSON text. A blank system message is dropped. With `answered`, an assistant message
    is required; otherwise the record is a prompt. Raise BadRecord with the reason: a missing field,
    a wrong type, roles out of order, empty content. A `Fields` notes which fields are used.
    """
    record = as_fields(record)
    items = _raw_messages(record, answered)
    tools = _tools(record, items)
    messages = [_message(item, f"message {index + 1}") for index, item in enumerate(items)]
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages.pop(0)
    if not messages or messages[0].role != "system":
        system = record.first("system", "system_prompt")
        if system not in (None, *_EMPTY) and _text(system, "`system`").strip():
            messages.insert(0, Message(role="system", content=system))
    _check_order(messages)
    for index, message in enumerate(messages):
        if not message.content.strip() and message.role != "tool" and not message.calls:
            raise BadRecord(f"message {index + 1}: empty content")
    if answered and all(message.role != "assistant" for message in messages):
        raise BadRecord("no assistant turn")
    return Conversation(messages=tuple(messages), tools=tuple(tools))


def with_messages(record: Fields, messages: list[Any]) -> Fields:
    """Return a record of these messages with the system text and tools of another record."""
    system = None
    if not messages or as_fields(messages[0]).peek("role") not in ("system", "developer"):
        system = record.first("system", "system_prompt")
    tools = {key: record.get(key) for key in ("tools", "functions") if key in record}
    return Fields({"messages": messages, "system": system} | tools)


def read_messages(record: Fields, key: str) -> list[Fields] | None:
    """Return the messages in a field: a list of objects, an object of lists (columns), or either as
    JSON text. Return None if the field is absent.
    """
    items = record.decode(key, f"`{key}`")
    if isinstance(items, dict) and all(isinstance(column, list) for column in items.values()):
        columns = list(items.values())
        if len({len(column) for column in columns}) > 1:
            raise BadRecord(f"the columns of `{key}` have different lengths")
        names, rows = list(items), zip(*columns, strict=True)
        record[key] = items = [Fields(dict(zip(names, row, strict=True))) for row in rows]
    if items is None:
        return None
    if not isinstance(items, list) or not all(isinstance(item, Fields) for item in items):
        raise BadRecord(f"`{key}` is not a list of objects")
    return items


def _raw_messages(record: Fields, answered: bool) -> list[Fields]:
    """Return the record's messages as role/content objects, not yet validated."""
    for key in ("messages", "conversations"):
        if key in record:
            return read_messages(record, key) or []
    for key in QUESTION_FIELDS:
        if key in record:
            return _from_question(record, key, answered)
    raise BadRecord(
        "has none of `messages`, `conversations`, "
        + ", ".join(f"`{key}`" for key in QUESTION_FIELDS)
    )


def _from_question(record: Fields, key: str, answered: bool) -> list[Fields]:
    """Return the turns of `history`, the question and its answer, as role/content objects."""
    turns = history_turns(record)
    is_chat = isinstance(record.peek(key), list) and key == "prompt"
    if is_chat and all(isinstance(item, Fields) for item in record.peek(key)):
        turns += read_messages(record, key) or []
    else:
        turns.append(Fields({"role": "user", "content": question_text(record, key)}))
    completion = record.peek("completion")
    if isinstance(completion, dict | list) and completion and is_chat:
        if isinstance(completion, dict):
            record["completion"] = [completion]
        return turns + (read_messages(record, "completion") or [])
    fields = ("output", *ANSWER_FIELDS) if key == "instruction" else ANSWER_FIELDS
    answer = answer_of(record, fields)
    if answer is None and answered:
        raise BadRecord(f"no text in any of {', '.join(f'`{name}`' for name in ANSWER_FIELDS)}")
    answer_turn = [] if answer is None else [Fields({"role": "assistant", "content": answer})]
    return turns + answer_turn


def history_turns(record: Fields) -> list[Fields]:
    """Return the (question, answer) pairs of `history` (Alpaca) as role/content objects."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise BadRecord("`history` is not a list of pairs")
    return [
        Fields({"role": role, "content": text})
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def question_text(record: Fields, key: str) -> str:
    """Return the question in a field, followed by the record's `input`, `context` and options."""
    parts = [_text(record.get(key), f"`{key}`")]
    for extra in ("input", "context"):
        if record.first(extra) not in (None, *_EMPTY):
            value = record.get(extra)
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                value = "\n\n".join(value)
            parts.append(_text(value, f"`{extra}`"))
    options = record.first("options", "choices")
    if options not in (None, *_EMPTY):
        parts.append(_options(options))
    return "\n\n".join(parts)


def _options(options: Any) -> str:
    """Return the options of a question, one per line, lettered unless all of them are."""
    if isinstance(options, dict):
        columns = [options.get(key) for key in ("label", "text")] if "text" in options else []
        pairs = list(zip(*columns, strict=False)) if all(map(_is_list, columns)) else []
        pairs = pairs if columns else list(options.items())
        lines = [f"{label}. {text}" for label, text in pairs]
        texts = [_as_text(text) for _, text in pairs]
    else:
        texts = [_as_text(option) for option in options] if isinstance(options, list) else [None]
        lettered = all(
            text is not None and text[:1] == letter and text[1:2] in (")", ".", ":")
            for text, letter in zip(texts, "ABCDEFGHIJ", strict=False)
        )
        letters = [""] * len(texts) if lettered else [f"{chr(65 + i)}. " for i in range(len(texts))]
        lines = [f"{letter}{text}" for letter, text in zip(letters, texts, strict=True)]
    if not texts or None in texts or len(texts) > 26:
        raise BadRecord("`options` is not a list of texts")
    return "\n".join(lines)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def answer_of(record: dict[str, Any], fields: Sequence[str]) -> str | None:
    """Return the first of these fields that holds a text, a number or a list of these, as text."""
    record = as_fields(record)
    for name in fields:
        value = record.peek(name)
        texts = [_as_text(item) for item in (value if isinstance(value, list) else [value])]
        if texts and None not in texts:
            record.get(name)
            return ", ".join(text for text in texts if text is not None)
    return None


def _as_text(value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if isinstance(value, str) else str(value) if is_number else None


def _message(item: Fields, where: str) -> Message:
    is_sharegpt = "from" in item
    name = item.get("from" if is_sharegpt else "role")
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(
            f"{where}: `role` is missing" if name is None else f"{where}: unknown role {name!r}"
        )
    if is_sharegpt and name.lower() == "function_call":
        return Message(
            role=role,
            content="",
            calls=_calls(item.decode("value", f"{where}: `tool_calls`"), where),
            trained=_is_trained(item, where),
        )
    content = item.first("value", "content") if is_sharegpt else item.get("content")
    parts = _parts(content)
    if parts:
        content = "".join(parts["text"])
    elif role == "tool" and not isinstance(content, str):
        content = "" if content is None else json.dumps(plain(content), ensure_ascii=False)
    if role != "assistant":
        if content is None:
            raise BadRecord(f"{where}: `content` is missing")
        return Message(role=role, content=_text(content, f"{where}: `content`"))
    calls: list[Any] = parts.get("tool_call") or []
    for key in ("tool_calls", "function_call"):
        if not calls and key in item:
            calls = _as_list(item.decode(key, f"{where}: `{key}`"))
    if content is None and not calls:
        raise BadRecord(f"{where}: `content` is missing")
    reasoning = "".join(parts.get("reasoning") or [])
    return Message(
        role=role,
        content=_text("" if content is None else content, f"{where}: `content`"),
        reasoning=reasoning or _reasoning(item, where),
        calls=_calls(calls, where),
        trained=_is_trained(item, where),
    )


def _parts(content: Any) -> dict[str, list[str]]:
    """Return the texts of a content given in parts, by type: text (OpenAI), reasoning and tool_call
    (LLaMA-Factory). Return an empty dictionary for any other content.
    """
    if not isinstance(content, list) or not all(isinstance(part, Fields) for part in content):
        return {}
    by_type: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        text = part.first("text", "value")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in by_type or not isinstance(text, str):
            return {}
        by_type[kind].append(text)
    return by_type


def _reasoning(item: Fields, where: str) -> str:
    value = item.first("reasoning_content", "reasoning", "thinking")
    return _text(value or "", f"{where}: `reasoning_content`")


def _is_trained(item: Fields, where: str) -> bool:
    """Return False for a message with `weight: 0` (OpenAI) or `train: false`."""
    for key, allowed in (("weight", (0, 1)), ("train", (False, True))):
        value = item.get(key, 1)
        if value not in allowed:
            raise BadRecord(f"{where}: `{key}` is neither {allowed[0]} nor {allowed[1]}")
        if not value:
            return False
    return True


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where} is not text")
    return check_json(value, where)


def _calls(value: Any, where: str) -> tuple[Call, ...]:
    return tuple(_call(item, f"{where}: a tool call") for item in _as_list(value))


def _call(item: Any, where: str) -> Call:
    item = decode_json(item, where)
    if not isinstance(item, dict):
        raise BadRecord(f"{where} has no name")
    item = as_fields(item)
    if item.peek("type") == "function":
        item.get("type")
    inner = item.get("function") or item
    inner = as_fields(inner) if isinstance(inner, dict) else inner
    if not isinstance(inner, Fields) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRecord(f"{where} has no name")
    key = "arguments" if "arguments" in inner else "parameters"
    arguments = decode_json(inner.get(key), f"{where}'s arguments")
    if not isinstance(arguments, dict | None):
        raise BadRecord(f"{where}'s arguments are not a JSON object")
    return Call(name=check_json(inner["name"], where), arguments=plain(arguments or {}))


def _tools(record: Fields, items: list[Fields]) -> list[dict[str, Any]]:
    tools = _as_list(record.decode("tools", "`tools`"))
    if not tools:
        functions = _as_list(record.decode("functions", "`functions`"))
        tools = [{"type": "function", "function": function} for function in functions]
    if not tools and items and items[0].get("role") in ("system", "developer"):
        tools = _as_list(items[0].decode("tools", "`tools`"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("`tools` is not a list of objects")
    return [plain(tool) for tool in tools]


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
