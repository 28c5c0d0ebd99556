"""Rows of multiple-choice files. A row is an object in one of these shapes:

    {"context": "The sky is", "choices": ["blue", "made of tin"], "answer": 0}
    {"question": "What is tin?", "choices": ["a metal", "a tree"], "answer": "A"}
    {"choices": ["Ann thanked Bob so Ann", "Ann thanked Bob so Bob"],
     "continuation": " smiled.", "answer": 1}
    {"good": "Cats sleep.", "bad": "Cats sleeps."}

- `context` (or `query`) is taken as it stands; a `question` becomes `Question: ...`, a new line and
  `Answer:`, behind the context if there is one.
- `separator`, a space by default, stands between context and choice unless a blank is there.
- `answer` (or `gold`) is the number of the right choice from 0, its text, or its letter; a text is
  looked for among the choices before it is read as a letter.
- With `continuation` the choices are contexts of it; `good` and `bad` have no context.
- `task`, `subject` or `uid` names the group that the row is counted in.
"""

from typing import Any, NamedTuple

from tinsmith.data.files import check_text, get_text


class ChoiceQuestion(NamedTuple):
    """Which of the endings, each behind its context, is right?"""

    contexts: list[str]
    endings: list[str]
    num_bytes: list[int]
    """Bytes by which scores are divided: those of an ending without the separator."""
    gold: int
    group: str | None


def parse_question(record: dict[str, Any]) -> ChoiceQuestion:
    """A row in one of the shapes above. Raises ValueError that says what is wrong with it."""
    check_text(record)
    group = next((str(record[key]) for key in ("task", "subject", "uid") if record.get(key)), None)
    if "good" in record and "bad" in record:
        pair = [get_text(record, "good"), get_text(record, "bad")]
        return ChoiceQuestion(["", ""], pair, [_bytes(text) for text in pair], 0, group)
    choices = _choices(record)
    gold = _gold(record, choices)
    context = _context(record)
    separator = _optional(record, "separator", " ")
    joined = [_joined(context, separator, choice) for choice in choices]
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
        raise ValueError(f"'choices' holds {len(choices)}, not two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("every one of 'choices' must be text, and not empty")
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
        number = ord(answer.upper()) - ord("A")
        if number < len(choices):
            return number
    raise ValueError(f"'{key}' {answer!r} is no number, text or letter of a choice")


def _context(record: dict[str, Any]) -> str:
    context = _optional(record, "context" if "context" in record else "query", "")
    question = _optional(record, "question", "")
    if not question:
        return context
    before = f"{context}\n" if context else ""
    return f"{before}Question: {question}\nAnswer:"


def _optional(record: dict[str, Any], key: str, default: str) -> str:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"'{key}' is not text")
    return value


def _joined(context: str, separator: str, choice: str) -> str:
    blank = not context or context[-1].isspace() or choice[0].isspace()
    return choice if blank else separator + choice


def _bytes(text: str) -> int:
    return len(text.encode())
