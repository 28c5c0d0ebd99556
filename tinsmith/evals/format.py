"""Evaluate the output format: are completions machine-readable?

The rate of greedy completions that think and then answer, each once and inside its tags, and end
the turn: `<think>...</think> ... <answer>...</answer><|im_end|>`. Tags are single token ids, so
text that looks like a tag does not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.data.formats.prompts import Prompt
from tinsmith.infer.generate import generate
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.answers import is_same_answer
from tinsmith.text.tokenizer import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""The tags in their required order."""


class FormatRate(NamedTuple):
    """Counts of completions."""

    num_well_formed: int
    """Completions in the right format."""
    num_correct: int
    """Well-formed completions whose answer is the prompt's, by `text.answers.is_same_answer`."""
    num_completions: int

    def to_dict(self) -> dict[str, float]:
        """Return the fractions of all completions, and their number."""
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
    """Complete every prompt greedily and check the format; UserError without prompts."""
    if not prompts:
        raise UserError("format: there are no prompts to answer")
    greedy = SamplingParams(temperature=0.0)
    completions = generate(
        lm,
        tokenizer,
        [prompt.ids for prompt in prompts],
        sampling_params=greedy,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    answers = [extract_answer(tokenizer, completion.token_ids) for completion in completions]
    is_correct = [
        answer is not None and prompt.answer is not None and is_same_answer(prompt.answer, answer)
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    return FormatRate(sum(answer is not None for answer in answers), sum(is_correct), len(answers))


def extract_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """Return the text inside `<answer>` of a well-formed completion, else None.

    Every tag occurs once and in order, both pairs enclose something, and the turn ends right after
    the last tag.
    """
    tags = [tokenizer.special(tag) for tag in TAGS]
    positions = [position for position, token in enumerate(ids) if token in tags]
    if [ids[position] for position in positions] != tags:
        return None
    think_start, think_end, answer_start, answer_end = positions
    is_empty = think_end == think_start + 1 or answer_end == answer_start + 1
    if is_empty or list(ids[answer_end + 1 :]) != [tokenizer.end_of_turn]:
        return None
    return tokenizer.decode(ids[answer_start + 1 : answer_end])
