"""Evaluate multiple choice by log-likelihood: which ending is the most likely one?

    score(choice) = sum of ln p(token | all tokens before it) over the tokens of the choice

`acc` selects the choice by its score, `acc_norm` by its score per byte, which does not favour short
choices. Ties share the credit, so a model with equal scores is at the chance level. Context and
choice are encoded separately, so the boundary between them is a token boundary. Without a context,
the tokenizer's beginning-of-text token (or else its end-of-text token) is the context.
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
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.logprobs import token_nll
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer


class ChoiceScore(NamedTuple):
    """Accuracies on `n` questions, from 0 to 1."""

    acc: float
    acc_norm: float
    chance: float
    """Expected accuracy of random guessing."""
    n: int


class ChoiceResult(NamedTuple):
    """The result of `evaluate_choice`."""

    total: ChoiceScore
    groups: dict[str, ChoiceScore]
    """Scores by task, for records that name one."""
    truncated: int
    """Number of questions whose context was truncated on the left."""
    rejected: int
    """Number of skipped records."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data."""
        groups = {name: score._asdict() for name, score in self.groups.items()}
        counts = {"truncated": self.truncated, "rejected": self.rejected}
        return self.total._asdict() | counts | {"groups": groups}


class ChoiceSequence(NamedTuple):
    """At least two ids; the last `num_scored` are a choice, and the first is never scored."""

    ids: list[int]
    num_scored: int


class EncodedQuestion(NamedTuple):
    """A question and one sequence for each of its choices."""

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
    say: Callable[[str], None] = lambda sequence: None,
) -> ChoiceResult:
    """Return accuracies on the questions of a .jsonl, .jsonl.gz or .parquet file or of a folder.

    `evals/questions.py` describes the records. `limit` is the largest number of questions, spread
    evenly over the file. Contexts too long for the model are truncated on the left and counted;
    unusable records are skipped, counted and reported by `say`. `poll` is called before every batch
    and may raise to end the evaluation.

    Raises UserError if no record is usable.
    """
    check_limit(limit)
    questions, rejects = _read(path)
    if limit is not None and limit < len(questions):
        questions = [questions[i * len(questions) // limit] for i in range(limit)]
    encoded: list[EncodedQuestion] = []
    for question, record in questions:
        try:
            encoded.append(encode_question(question, tokenizer, lm.config.max_seq_len))
        except (ValueError, UserError) as error:
            rejects.append(Reject(record.file, record.line, str(error)))
    report_rejects(f"{path}", "question", len(encoded), rejects, say)
    sequences = [sequence for item in encoded for sequence in item.sequences]
    with eval_mode(lm):
        sums = log_likelihoods(lm, sequences, batch_size, poll).tolist()
    groups: dict[str, list[_QuestionScore]] = {}
    scores = list(_score_questions([item.question for item in encoded], sums))
    for item, score in zip(encoded, scores, strict=True):
        if item.question.group is not None:
            groups.setdefault(item.question.group, []).append(score)
    by_group = {name: _mean(group_scores) for name, group_scores in groups.items()}
    truncated = sum(item.truncated for item in encoded)
    return ChoiceResult(_mean(scores), by_group, truncated, len(rejects))


def _read(path: Path | str) -> tuple[list[tuple[ChoiceQuestion, Record]], list[Reject]]:
    """Return every question with its record, and the rejected records."""
    questions: list[tuple[ChoiceQuestion, Record]] = []
    rejects: list[Reject] = []
    for file in files.find_files(str(path), "tasks"):
        if file.name.endswith(".txt"):
            raise UserError(f"{file}: questions are read from .jsonl, .jsonl.gz or .parquet files")
        for record in files.read_records(file):
            if isinstance(record, Reject):
                rejects.append(record)
                continue
            try:
                questions.append((parse_question(record.data), record))
            except ValueError as error:
                rejects.append(Reject(record.file, record.line, str(error)))
    return questions, rejects


def encode_question(
    question: ChoiceQuestion, tokenizer: Tokenizer, max_seq_len: int
) -> EncodedQuestion:
    """Encode contexts and endings; contexts are truncated on the left to fit `max_seq_len`.

    All contexts get the room that the longest ending leaves. Raises ValueError if it leaves none.
    """
    contexts, endings = [], []
    for context, ending in zip(question.contexts, question.endings, strict=True):
        if context:
            contexts.append(tokenizer.prefix + tokenizer.encode(context))
            endings.append(tokenizer.encode_inside(ending))
        else:
            contexts.append(tokenizer.prefix or [tokenizer.end_of_text])
            endings.append(tokenizer.encode(ending))
    longest = max(map(len, endings))
    max_context = max_seq_len + 1 - longest
    if max_context < 1:
        raise ValueError(
            f"a choice of {longest} tokens does not fit the model's context of {max_seq_len}"
        )
    sequences = [
        ChoiceSequence(context_ids[-max_context:] + ending_ids, len(ending_ids))
        for context_ids, ending_ids in zip(contexts, endings, strict=True)
    ]
    return EncodedQuestion(question, sequences, max(map(len, contexts)) > max_context)


def log_likelihoods(
    lm: LM, sequences: list[ChoiceSequence], batch_size: int, poll: Callable[[], object]
) -> Tensor:
    """Return ln p(choice | context) of each sequence, (number of sequences,) float64, in nats.

    Sequences are right-padded, `batch_size` at a time, longest first. The caller sets evaluation
    mode and no_grad.
    """
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    device = lm.embed.weight.device
    for start in range(0, len(order), batch_size):
        poll()
        batch = order[start : start + batch_size]
        ids, mask, segments = _pad([sequences[i] for i in batch])
        hidden = lm(ids[:, :-1].to(device), segments=segments.to(device), logits=False).hidden
        targets = ids[:, 1:][mask].to(device)
        nll = token_nll(hidden[mask.to(device)], targets, lm.head).cpu().double()
        row = torch.arange(len(batch))[:, None].expand_as(mask)[mask]
        sums[batch] = -torch.bincount(row, nll, len(batch))
    return sums


def _pad(sequences: list[ChoiceSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (B, T + 1), the mask of scored targets ids[:, 1:] (B, T), and segments (B, T)."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width - 1, dtype=torch.bool)
    segments = torch.full((len(sequences), width - 1), -1)
    for row, sequence in enumerate(sequences):
        num_inputs = len(sequence.ids) - 1
        ids[row, : num_inputs + 1] = torch.tensor(sequence.ids)
        mask[row, num_inputs - sequence.num_scored : num_inputs] = True
        segments[row, :num_inputs] = 0
    return ids, mask, segments


class _QuestionScore(NamedTuple):
    """Credit of a question: by score, by score per byte, by chance."""

    acc: float
    acc_norm: float
    chance: float


def _score_questions(
    questions: list[ChoiceQuestion], sums: list[float]
) -> Iterator[_QuestionScore]:
    start = 0
    for question in questions:
        count = len(question.endings)
        scores = sums[start : start + count]
        per_byte = [score / size for score, size in zip(scores, question.num_bytes, strict=True)]
        yield _QuestionScore(
            _credit(scores, question.gold), _credit(per_byte, question.gold), 1 / count
        )
        start += count


def _credit(scores: list[float], gold: int) -> float:
    """Return 1 if `gold` alone has the best score, 1/n if n choices tie; 0 for NaN."""
    best = max(scores)
    if any(map(math.isnan, scores)) or scores[gold] < best:
        return 0.0
    return 1 / scores.count(best)


def _mean(scores: list[_QuestionScore]) -> ChoiceScore:
    acc, norm, chance = (math.fsum(column) / len(scores) for column in zip(*scores, strict=True))
    return ChoiceScore(acc, norm, chance, len(scores))
