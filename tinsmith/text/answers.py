r"""Extract the final answer of a text, and compare it with a reference answer.

References and completions are read alike. Reasoning is left out: the answer is what follows
`</think>`, and there the last `<answer>` span. In it the last mark of a final answer counts:
`\boxed{...}` (MATH) or `#### ...` (GSM8K), or else the sentence after "answer is" or "answer:".
"""

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\w))?|\.\d+"
_VALUE = rf"((?<![0-9A-Za-z)\]])-)?({_DIGITS})(?:\s?/\s?({_DIGITS}))?"
_NUMBER = re.compile(_VALUE)
_UNIT = r"(?:%|°?[^\W\d_]+(?:[/^][^\W_]+)?[²³]?)"
_QUANTITY = re.compile(
    rf"(?:[A-Za-z]\s?=)?\s*[+~≈=]?\s*({_VALUE})(?![a-z]\W*$)\s*({_UNIT}(?:\s{_UNIT})?)?"
)
"""A number, alone or with a unit of one or two words; "5x" is no number."""
_CHOICE = re.compile(r"\W*([A-Z])(?:[).:,\]]|\W*$)")
"""A letter of a multiple choice at the beginning: "A", "(A)", "A. Paris"."""
_LETTER = re.compile(r"(?<![\w'])[A-Z](?![\w'])")
_HASHES = re.compile(r"(?<!#)####(?!#)[^\S\n]*(\S.*)")
_PHRASE = re.compile(
    r"(?:\banswer\W{0,3}(?:is|=|:)|答案\s*(?:是|为|:|：))\W{0,2}?\s*(\S.*?)"
    r"(?:(?<!\bSt)(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?](?=\s|$)|[。！？]|\n|$)",
    re.IGNORECASE,
)
_OPPOSITES = (("yes", "no"), ("true", "false"))
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[!,;]|\\left|\\right|\\[()\[\]]|(?:US)?\\?[$€£¥₹]|\*\*"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%# ])"), r"\1"),
    (re.compile(r"[\u2212\u2013\uff0d]"), "-"),
    (re.compile("\u2044"), "/"),
)
"""Notation without meaning for an answer, and its replacement; U+2212 and others become a minus."""


class FinalAnswer(NamedTuple):
    """The final answer of a text."""

    text: str
    marked: bool
    """True if a mark or a phrase points at the answer, False if it is the whole text."""


def strip_reasoning(text: str) -> str:
    """Return the text after `</think>`, and there the last `<answer>` span if there is one, without
    end-of-turn tokens.
    """
    output = text.rpartition("</think>")[2]
    spans = re.findall(r"<answer>(.*?)</answer>", output, flags=re.DOTALL)
    output = spans[-1] if spans else output
    return output.replace("<|im_end|>", " ").replace("<|endoftext|>", " ")


def extract_final_answer(text: str) -> FinalAnswer:
    """Extract the final answer of a reference or a completion."""
    output = strip_reasoning(text)
    marks = _boxed(output) + [
        (match.start(), match[1]) for match in _HASHES.finditer(output) if _ends(output, match)
    ]
    if marks:
        return FinalAnswer(_plain(max(marks)[1]), True)
    output = _plain(output)
    phrases = _PHRASE.findall(output)
    return FinalAnswer(phrases[-1], True) if phrases else FinalAnswer(output, False)


def is_same_answer(reference: str, text: str) -> bool:
    """Return True if the final answer of `text` is that of the reference.

    Equal texts are always the same answer, ignoring case, whitespace and punctuation around them.
    If the reference is a number, also with a currency or a unit ("$72", "72%", "3/4"), numbers are
    compared: that after the mark, or else the last one in the text. The letter of a multiple choice
    ("A", "(A)") and yes/no or true/false are also found in a sentence.
    """
    if _normalise(reference) == _normalise(text):
        return True
    expected, found = extract_final_answer(reference).text, extract_final_answer(text)
    if not expected.strip():
        return False
    if (value := _quantity(expected)) is not None:
        return _stated_value(found) == value
    wanted = _normalise(expected)
    if wanted == _normalise(found.text):
        return True
    if letter := re.fullmatch(r"[([]?([A-Z])[)\]]?[.:]?", expected.strip()):
        return _choice(found.text) == letter[1]
    for words in _OPPOSITES:
        if wanted in words:
            return _opposite(found.text, words) == wanted
    return False


def contains_answer(reference: str, text: str) -> bool:
    """Return True if the text after `</think>` contains the reference answer, anywhere: as one of
    its numbers, or as words.
    """
    output = _plain(strip_reasoning(text))
    expected = extract_final_answer(reference).text
    if (value := _quantity(expected)) is not None:
        return any(_fraction(match) == value for match in _NUMBER.finditer(output))
    words = re.escape(_normalise(expected))
    return bool(re.search(rf"(?<!\w){words}(?!\w)", _normalise(output)))


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""Return position and content of every `\boxed{...}` with balanced braces."""
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth = 1
        for index in range(match.end(), len(text)):
            depth += (text[index] == "{") - (text[index] == "}")
            if not depth:
                found.append((match.start(), text[match.end() : index]))
                break
    return [(position, content) for position, content in found if content.strip()]


def _ends(text: str, hashes: re.Match[str]) -> bool:
    """Return True if `####` marks an answer, False for a heading: nothing follows its line, or the
    line is a number, a letter or yes/no.
    """
    line = _plain(hashes[1])
    return (
        not text[hashes.end() :].strip()
        or _quantity(line) is not None
        or bool(re.fullmatch(r"\W*[A-Z]\W*", line))
        or any(_normalise(line) in words for words in _OPPOSITES)
    )


def _plain(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _fraction(match: re.Match[str], group: int = 1) -> Fraction | None:
    """Return the value of a number or a quotient; None with a denominator of 0 or 4,300 digits."""
    sign, above, below = match.group(group, group + 1, group + 2)
    try:
        value = Fraction(above.replace(",", "")) / Fraction((below or "1").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
    return -value if sign else value


def _quantity(text: str) -> Fraction | None:
    """Return the value of a text that is a number, or a number with a unit in lower case."""
    match = _QUANTITY.fullmatch(text.strip().rstrip(".!。"))
    if match is None:
        return None
    units = (match[5] or "").split()
    is_unit = all(unit == unit.lower() or (unit.isupper() and len(unit) < 5) for unit in units)
    return _fraction(match, 2) if is_unit else None


def _stated_value(answer: FinalAnswer) -> Fraction | None:
    """Return the number that a completion gives as its answer."""
    if (value := _quantity(answer.text)) is not None:
        return value
    text = answer.text.rpartition("=")[2] if answer.marked else answer.text
    numbers = list(_NUMBER.finditer(text)) or list(_NUMBER.finditer(answer.text))[-1:]
    return _fraction(numbers[0 if answer.marked else -1]) if numbers else None


def _choice(text: str) -> str | None:
    """Return the letter that a text begins with, or else the last one that stands alone."""
    if match := _CHOICE.match(text):
        return match[1]
    letters = _LETTER.findall(text)
    return letters[-1] if letters else None


def _opposite(text: str, words: tuple[str, str]) -> str | None:
    """Return the one of two opposite words that a text begins with, or else the only one in it."""
    found = re.findall(r"\w+", text.casefold())
    if found[:1] and found[0] in words and found[1:2] != ["or"]:
        return found[0]
    stated = {word for word in found if word in words}
    return stated.pop() if len(stated) == 1 and "not" not in found else None


def _normalise(text: str) -> str:
    """Return a text without case, end-of-turn tokens, and punctuation or whitespace around it."""
    whole = " ".join(_plain(text).replace("<|im_end|>", " ").split()).casefold()
    return whole.strip(" .,;:!?。！？\"'`*()[]{}") or whole
