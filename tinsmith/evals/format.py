"""Do answers have the form that a program can read?

Of greedy answers to prompts, the share that thinks and then answers, each once and inside its tags,
and ends its turn: `<think>...</think> ... <answer>...</answer><|im_end|>`. Tags are ids of their
own, so text that only looks like one does not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.data.formats.prompts import Prompt
from tinsmith.infer.generate import generate
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""In the order in which they must come."""


class FormatRate(NamedTuple):
    """What was counted."""

    num_well_formed: int
    """Answers of the right form."""
    num_correct: int
    """Of those, the ones that say the prompt's own answer, blanks aside."""
    num_completions: int

    def to_dict(self) -> dict[str, float]:
        """Shares of all answers, and how many there were."""
        return {
            "format": self.num_well_formed / self.num_completions,
            "accuracy": self.num_correct / self.num_completions,
            "completions": self.num_completions,
        }


def evaluate_format(
    lm: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> FormatRate:
    """Answer every prompt greedily and look at the form; UserError without prompts."""
    if not prompts:
        raise UserError("format: there are no prompts to answer")
    requested = [prompt.ids for prompt in prompts]
    greedy = SamplingParams(temperature=0.0)
    output = generate(
        lm,
        tokenizer,
        requested,
        sampling_params=greedy,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    found = [extract_answer(tokenizer, answer.token_ids) for answer in output]
    exact = [
        inside is not None and inside.split() == (prompt.answer or "").split()
        for inside, prompt in zip(found, prompts, strict=True)
    ]
    return FormatRate(sum(each is not None for each in found), sum(exact), len(found))


def extract_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """What an answer of the right form says inside `<answer>`; None for any other.

    Every tag comes once and in order, something stands inside both pairs, and the turn ends right
    after the last tag.
    """
    tags = [tokenizer.special(tag) for tag in TAGS]
    places = [place for place, token in enumerate(ids) if token in tags]
    if [ids[place] for place in places] != tags:
        return None
    opened, thought, begun, ended = places
    empty = thought == opened + 1 or ended == begun + 1
    if empty or list(ids[ended + 1 :]) != [tokenizer.end_of_turn]:
        return None
    return tokenizer.decode(ids[begun + 1 : ended])
