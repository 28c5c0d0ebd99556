"""Evaluate the specialisation of experts over the rows of a data source.

    information = sum over c, e of p(c, e) log2 (p(c, e) / (p(c) p(e)))       (bits)

is the mutual information of a token's class (letters, digits, white space, ...) and an expert that
processes it, over random pairs. It is at most the entropy of the classes; `normalized_mi` is the
ratio. The estimate is biased upwards by about (classes - 1) (experts - 1) / (2 ln 2 pairs).

    jaccard = mean over pairs of tasks of 1 - |A & B| / |A | B|

is the distance between the sets of experts that two tasks use more than uniformly; a task is a
source of the data. (Tiny-ONN's routing mutual information and inter-task Jaccard distance.)

Legend: B rows, T tokens, E experts, C classes, S sources, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tinsmith.data.loader.loader import TokenizedDataset
from tinsmith.infer.generate import eval_mode
from tinsmith.nn.contract import Routed
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer

TOKEN_CLASSES = ("special", "other", "letters", "digits", "white space", "punctuation")


class Specialisation(NamedTuple):
    """Specialisation of the experts of one layer, or the mean of several layers."""

    mutual_information: float
    """Bits of information about a token's class in its expert; NaN if nothing was routed."""
    class_entropy: float
    """Entropy of the classes of routed tokens, in bits."""
    jaccard: float | None
    """From 0 (same experts) to 1 (disjoint experts); None with fewer than two tasks."""

    @property
    def normalized_mi(self) -> float:
        """Mutual information divided by class entropy; NaN if that is 0."""
        return self.mutual_information / self.class_entropy if self.class_entropy else math.nan

    def __str__(self) -> str:
        bits = f"{self.mutual_information:.2f} of {self.class_entropy:.2f} bits"
        text = f"carry {bits} of a token's class"
        return text if self.jaccard is None else f"{text}, jaccard {self.jaccard:.2f} between tasks"

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data, except for NaN."""
        data = {
            "mutual_information": self.mutual_information,
            "class_entropy": self.class_entropy,
            "normalized_mi": self.normalized_mi,
        }
        return data if self.jaccard is None else data | {"jaccard": self.jaccard}


@torch.no_grad()
def evaluate_routing(
    lm: LM,
    source: TokenizedDataset,
    classes_V: Tensor,
    *,
    max_samples: int,
    batch_size: int,
    device: torch.device | str,
    poll: Callable[[], object],
) -> dict[str, Specialisation]:
    """Return the specialisation by "layer.slot" of every routed module, and `all`, their mean.

    Empty for a model without experts. One pass over at most `max_samples` rows, spread evenly over
    `source`; `classes_V` int64 is the class of each id. No global random state is used, and the
    model's modes are restored.
    """
    source_ids = [int(source.subset(name).get_batch(0, 1).source[0]) for name in source.names]
    counters = {
        name: _Counter(module, int(classes_V.max()) + 1, 1 + max(source_ids))
        for name, module in lm.routed_modules().items()
    }
    if not counters:
        return {}
    with eval_mode(lm), torch.compiler.set_stance("force_eager"), _register_hooks(lm, counters):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            for counter in counters.values():
                counter.set_tokens(classes_V[batch.ids], batch.source)
            on_device = batch.to(device)
            lm(on_device.ids, on_device.positions, on_device.segments, logits=False)
    results = {name: counter.result() for name, counter in counters.items()}
    return results | {"all": _mean(list(results.values()))}


def token_classes(tokenizer: Tokenizer) -> Tensor:
    """Return the index in TOKEN_CLASSES of every id, (V,) int64.

    The class of a token is that of its first character that is not white space; non-ASCII text
    counts as letters, an incomplete character as other.
    """
    special = set(tokenizer.added_tokens.values())
    return torch.tensor(
        [
            0
            if token_id in special
            else TOKEN_CLASSES.index(_class(tokenizer.token_bytes(token_id)))
            for token_id in range(tokenizer.vocab_size)
        ]
    )


def mutual_information(counts: Tensor) -> float:
    """Return the mutual information of rows and columns in bits, from counts of pairs (C, E)."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / independent).log2()).where(joint > 0, 0).sum().clamp(min=0))


def jaccard_distance(table: Tensor) -> float | None:
    """Return the mean Jaccard distance between the sets of experts of pairs of tasks, from (S, E).

    A task's set has the experts that it uses more than uniformly. None if fewer than two tasks used
    any.
    """
    expert_sets = [row > row.mean() for row in table.double() if bool(row.any())]
    distances = [_distance(first, second) for first, second in combinations(expert_sets, 2)]
    return fmean(distances) if distances else None


def _distance(first: Tensor, second: Tensor) -> float:
    """Return the Jaccard distance; two empty sets have distance 0."""
    union = int((first | second).sum())
    return 1 - int((first & second).sum()) / union if union else 0.0


class _Counter:
    """Counts of (token, expert) pairs of one module, by the token's class and source."""

    def __init__(self, module: Routed, num_classes: int, num_sources: int):
        self.module, self._shape = module, (num_classes, num_sources)
        self._groups_BT = torch.zeros(0, 0, dtype=torch.long)
        self._table = torch.zeros((), dtype=torch.float64)

    def set_tokens(self, classes_BT: Tensor, source_B: Tensor) -> None:
        """Set the classes and sources of the tokens of the next forward pass."""
        self._groups_BT = classes_BT * self._shape[1] + source_B[:, None]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count the selected experts; called as a forward pre-hook."""
        selected_NE = self.module.expert_mask(inputs[0], inputs[1]).flatten(0, 1).cpu().double()
        counts = selected_NE.new_zeros(math.prod(self._shape), selected_NE.shape[1])
        self._table = self._table + counts.index_add(0, self._groups_BT.flatten(), selected_NE)

    def result(self) -> Specialisation:
        """Compute the specialisation from the counts, in bits."""
        if not bool(self._table.any()):
            return Specialisation(math.nan, math.nan, None)
        table_CSE = self._table.unflatten(0, self._shape)
        by_class, by_source = table_CSE.sum(1), table_CSE.sum(0)
        entropy = mutual_information(by_class.sum(1).diag())
        return Specialisation(mutual_information(by_class), entropy, jaccard_distance(by_source))


@contextmanager
def _register_hooks(lm: LM, counters: dict[str, _Counter]) -> Iterator[None]:
    hooks = [
        cast(nn.Module, counter.module).register_forward_pre_hook(counter)
        for counter in counters.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mean(results: list[Specialisation]) -> Specialisation:
    valid = [result for result in results if not math.isnan(result.mutual_information)]
    if not valid:
        return Specialisation(math.nan, math.nan, None)
    distances = [result.jaccard for result in valid if result.jaccard is not None]
    return Specialisation(
        fmean(result.mutual_information for result in valid),
        fmean(result.class_entropy for result in valid),
        fmean(distances) if distances else None,
    )


def _class(piece: bytes) -> str:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "other"
    character = text.strip()[:1]
    if not character:
        return "white space" if text else "other"
    tests = {
        "letters": character.isalpha() or not character.isascii(),
        "digits": character.isdigit(),
    }
    return next((name for name, is_match in tests.items() if is_match), "punctuation")
