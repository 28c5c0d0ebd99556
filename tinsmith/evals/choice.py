"""Multiple choice by log-likelihood: which of several endings does the model find most likely?

    score(choice) = sum of ln p(token | all before it) over the tokens of the choice

`acc` chooses by the score, `acc_norm` by the score per byte of the choice, which does not favour
short ones. A tie counts for its share, so that a model that says nothing is at the chance level.
Context and choice are encoded apart: the border between them is one between tokens. Where there is
no context, the tokenizer's mark of a beginning (or else of an end) stands in its place.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.data import files
from tinsmith.data.files import Record, Reject
from tinsmith.evals.bpb import check_limit, report_rejects
from tinsmith.evals.questions import ChoiceQuestion, parse_question
from tinsmith.evals.sliding_window import bos_ids
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.logprobs import token_nll
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer


class ChoiceScore(NamedTuple):
    """Shares of `n` questions, from 0 to 1."""

    acc: float
    acc_norm: float
    chance: float
    """What guessing would give."""
    n: int


class ChoiceResult(NamedTuple):
    """What `evaluate_choice` found."""

    total: ChoiceScore
    groups: dict[str, ChoiceScore]
    """By task, where rows name one."""
    truncated: int
    """Questions whose context lost its beginning."""
    rejected: int
    """Rows left out."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data."""
        groups = {name: score._asdict() for name, score in self.groups.items()}
        counts = {"truncated": self.truncated, "rejected": self.rejected}
        return self.total._asdict() | counts | {"groups": groups}


class ChoiceSequence(NamedTuple):
    """At least two ids, of which the last `num_scored` are a choice; the first is never scored."""

    ids: list[int]
    num_scored: int


class EncodedQuestion(NamedTuple):
    """A question and a line for each of its choices."""

    question: ChoiceQuestion
    sequences: list[ChoiceSequence]
    truncated: bool


@torch.no_grad()
def evaluate_choice(
    lm: LM,
    tokenizer: Tokenizer,
    path: Path | str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    poll: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> ChoiceResult:
    """Accuracy on the questions of a .jsonl, .jsonl.gz or .parquet file, or of a folder of them;
    `evals/questions.py` says what rows look like.

    `limit`: at most so many questions, spread evenly over the file. Contexts too long for the model
    lose their beginning, and are counted; rows that cannot be used are left out, counted and told
    to `say`. `poll` is called before every batch and may raise to end it.

    Raises UserError where no row can be used.
    """
    check_limit(limit)
    found, rejects = _read(path)
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    encoded: list[EncodedQuestion] = []
    for question, row in found:
        try:
            encoded.append(encode_question(question, tokenizer, lm.config.max_seq_len))
        except (ValueError, UserError) as error:
            rejects.append(Reject(row.file, row.line, str(error)))
    report_rejects(f"{path}", "question", len(encoded), rejects, say)
    lines = [line for one in encoded for line in one.sequences]
    with eval_mode(lm):
        sums = log_likelihoods(lm, lines, batch_size, poll).tolist()
    groups: dict[str, list[_Mark]] = {}
    marks = list(_marks([one.question for one in encoded], sums))
    for one, mark in zip(encoded, marks, strict=True):
        if one.question.group is not None:
            groups.setdefault(one.question.group, []).append(mark)
    by_group = {name: _mean(some) for name, some in groups.items()}
    truncated = sum(one.truncated for one in encoded)
    return ChoiceResult(_mean(marks), by_group, truncated, len(rejects))


def _read(path: Path | str) -> tuple[list[tuple[ChoiceQuestion, Record]], list[Reject]]:
    """Every question with its place, and the rows that hold none."""
    found: list[tuple[ChoiceQuestion, Record]] = []
    rejects: list[Reject] = []
    for file in files.find_files(str(path), "tasks"):
        if file.name.endswith(".txt"):
            raise UserError(f"{file}: questions are read from .jsonl, .jsonl.gz or .parquet files")
        for row in files.read_records(file):
            if isinstance(row, Reject):
                rejects.append(row)
                continue
            try:
                found.append((parse_question(row.data), row))
            except ValueError as error:
                rejects.append(Reject(row.file, row.line, str(error)))
    return found, rejects


def encode_question(
    question: ChoiceQuestion, tokenizer: Tokenizer, max_seq_len: int
) -> EncodedQuestion:
    """Ids of contexts and endings; every context is cut on the left to what the longest ending
    leaves of `most` positions. Raises ValueError where it leaves none.
    """
    before, after = [], []
    for context, ending in zip(question.contexts, question.endings, strict=True):
        if context:
            before.append(bos_ids(tokenizer) + tokenizer.encode(context))
            after.append(tokenizer.encode_inside(ending))
        else:
            before.append(bos_ids(tokenizer) or [tokenizer.end_of_text])
            after.append(tokenizer.encode(ending))
    longest = max(map(len, after))
    room = max_seq_len + 1 - longest
    if room < 1:
        raise ValueError(
            f"a choice of {longest} tokens does not fit the model's context of {max_seq_len}"
        )
    lines = [ChoiceSequence(b[-room:] + a, len(a)) for b, a in zip(before, after, strict=True)]
    return EncodedQuestion(question, lines, max(map(len, before)) > room)


def log_likelihoods(
    lm: LM, sequences: list[ChoiceSequence], batch_size: int, poll: Callable[[], object]
) -> Tensor:
    """(number of lines,) float64: ln p(choice | what stands before it) of each line, in nats.

    Longest lines first, `batch_rows` at a time, padded on the right. The caller sees to evaluation
    mode and no_grad.
    """
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    device = lm.embed.weight.device
    for start in range(0, len(order), batch_size):
        poll()
        chosen = order[start : start + batch_size]
        ids, mask, segments = _padded([sequences[i] for i in chosen])
        hidden = lm(ids[:, :-1].to(device), segments=segments.to(device), logits=False).hidden
        targets = ids[:, 1:][mask].to(device)
        nll = token_nll(hidden[mask.to(device)], targets, lm.head).cpu().double()
        row = torch.arange(len(chosen))[:, None].expand_as(mask)[mask]
        sums[chosen] = -torch.bincount(row, nll, len(chosen))
    return sums


def _padded(lines: list[ChoiceSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T + 1), which of the targets ids[:, 1:] are scored (B, T), segments (B, T)."""
    width = max(len(line.ids) for line in lines)
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    mask = torch.zeros(len(lines), width - 1, dtype=torch.bool)
    segments = torch.full((len(lines), width - 1), -1)
    for row, line in enumerate(lines):
        inputs = len(line.ids) - 1
        ids[row, : inputs + 1] = torch.tensor(line.ids)
        mask[row, inputs - line.num_scored : inputs] = True
        segments[row, :inputs] = 0
    return ids, mask, segments


class _Mark(NamedTuple):
    """How far right a question was answered: by score, by score per byte, by guessing."""

    acc: float
    acc_norm: float
    chance: float


def _marks(questions: list[ChoiceQuestion], sums: list[float]) -> Iterator[_Mark]:
    start = 0
    for question in questions:
        count = len(question.endings)
        scores = sums[start : start + count]
        per_byte = [score / size for score, size in zip(scores, question.num_bytes, strict=True)]
        yield _Mark(_credit(scores, question.gold), _credit(per_byte, question.gold), 1 / count)
        start += count


def _credit(scores: list[float], gold: int) -> float:
    """1 where `gold` alone is best, its share where others are as good; 0 where one is NaN."""
    best = max(scores)
    if any(map(math.isnan, scores)) or scores[gold] < best:
        return 0.0
    return 1 / scores.count(best)


def _mean(marks: list[_Mark]) -> ChoiceScore:
    acc, norm, chance = (math.fsum(column) / len(marks) for column in zip(*marks, strict=True))
    return ChoiceScore(acc, norm, chance, len(marks))
