"""Parse records of multiple-choice questions, objects in one of these formats:

    {"context": "The sky is", "choices": ["blue", "made of tin"], "answer": 0}
    {"question": "What is tin?", "choices": ["a metal", "a tree"], "answer": "A"}
    {"choices": ["Ann thanked Bob so Ann", "Ann thanked Bob so Bob"],
     "continuation": " smiled.", "answer": 1}
    {"good": "Cats sleep.", "bad": "Cats sleeps."}

- `context` (or `query`) is used as it is; a `question` becomes `Question: ...`, a new line and
  `Answer:`, after the context if there is one.
- `separator`, a space by default, stands between context and choice unless there is whitespace.
- `answer` (or `gold`) is the index of the right choice from 0, its text, or its letter; a text is
  first searched among the choices, then read as a letter.
- With `continuation` the choices are contexts of it; `good` and `bad` have no context.
- `task`, `subject` or `uid` names the group of the question.
"""

from typing import Any, NamedTuple

from tinsmith.data.files import check_text, get_text


class ChoiceQuestion(NamedTuple):
    """A question: which ending, each after its context, is right?"""

    contexts: list[str]
    endings: list[str]
    num_bytes: list[int]
    """Number of bytes of each ending without the separator, for scores per byte."""
    gold: int
    group: str | None


def parse_question(record: dict[str, Any]) -> ChoiceQuestion:
    """Parse a record in one of the formats above. Raises ValueError with the reason."""
    check_text(record)
    group = next((str(record[key]) for key in ("task", "subject", "uid") if record.get(key)), None)
    if "good" in record and "bad" in record:
        pair = [get_text(record, "good"), get_text(record, "bad")]
        return ChoiceQuestion(["", ""], pair, [_bytes(text) for text in pair], 0, group)
    choices = _choices(record)
    gold = _gold(record, choices)
    context = _context(record)
    separator = _optional(record, "separator", " ")
    joined = [_with_separator(context, separator, choice) for choice in choices]
    count = len(choices)
    if "continuation" in record:
        ending = get_text(record, "continuation")
        contexts = [context + choice for choice in joined]
        return ChoiceQuestion(contexts, [ending] * count, [_bytes(ending)] * count, gold, group)
    return ChoiceQuestion(
        [context] * count, joined, [_bytes(choice) for choice in choices], gold, group
    )


def _choices(record: dict[str, Any]) -> list[str]:
    choices = record.get("choices")
    if not isinstance(choices, list):
        raise ValueError("needs a list 'choices', or 'good' and 'bad'")
    if len(choices) < 2:
        raise ValueError(f"'choices' has {len(choices)} items, not two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("all of 'choices' must be non-empty text")
    return choices


def _gold(record: dict[str, Any], choices: list[str]) -> int:
    key = next((key for key in ("answer", "gold") if key in record), None)
    if key is None:
        raise ValueError("no field 'answer'")
    answer = record[key]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        index = ord(answer.upper()) - ord("A")
        if index < len(choices):
            return index
    raise ValueError(f"'{key}' {answer!r} is not the index, text or letter of a choice")


def _context(record: dict[str, Any]) -> str:
    context = _optional(record, "context" if "context" in record else "query", "")
    question = _optional(record, "question", "")
    if not question:
        return context
    prefix = f"{context}\n" if context else ""
    return f"{prefix}Question: {question}\nAnswer:"


def _optional(record: dict[str, Any], key: str, default: str) -> str:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"'{key}' is not text")
    return value


def _with_separator(context: str, separator: str, choice: str) -> str:
    has_whitespace = not context or context[-1].isspace() or choice[0].isspace()
    return choice if has_whitespace else separator + choice


def _bytes(text: str) -> int:
    return len(text.encode())
