"""How much the experts of a model specialise, over the rows of a source.

    information = sum over c, e of p(c, e) log2 (p(c, e) / (p(c) p(e)))       (bits)

is what the expert of a pair (token, expert that works on it), drawn at random, tells of the token's
class: letters, digits, white space, ... It is at most the entropy of the classes; `share` is the
part of that. The estimate is of what was counted, and above the truth by about
(classes - 1) (experts - 1) / (2 ln 2 pairs).

    jaccard = mean over pairs of tasks of 1 - |A & B| / |A | B|

is how much tasks differ in the experts that they use more than evenly; a task is a source of the
data. (Tiny-ONN's routing mutual information and inter-task Jaccard distance.)

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
    """Of one layer, or the mean of several."""

    mutual_information: float
    """Bits that an expert tells of a token's class; NaN where nothing was routed."""
    class_entropy: float
    """Bits there are to tell: the entropy of the classes of routed tokens."""
    jaccard: float | None
    """From 0, the same experts, to 1, others; None with less than two tasks."""

    @property
    def normalized_mi(self) -> float:
        """Of what there is to tell; NaN where that is nothing."""
        return self.mutual_information / self.class_entropy if self.class_entropy else math.nan

    def __str__(self) -> str:
        bits = f"{self.mutual_information:.2f} of {self.class_entropy:.2f} bits"
        reported = f"carry {bits} of a token's class"
        return (
            reported
            if self.jaccard is None
            else f"{reported}, jaccard {self.jaccard:.2f} between tasks"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""
        reported = {
            "mutual_information": self.mutual_information,
            "class_entropy": self.class_entropy,
            "normalized_mi": self.normalized_mi,
        }
        return reported if self.jaccard is None else reported | {"jaccard": self.jaccard}


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
    """By "layer.slot" of every routed part, and `all`, their mean; empty for a model without.

    One pass over at most `rows` rows, spread evenly over `source`; `classes` (V,) int64 says what
    each id is. No global random state is touched and the model's modes are as before.
    """
    numbers = [int(source.subset(name).get_batch(0, 1).source[0]) for name in source.names]
    counters = {
        name: _Counter(part, int(classes_V.max()) + 1, 1 + max(numbers))
        for name, part in lm.routed_modules().items()
    }
    if not counters:
        return {}
    with eval_mode(lm), torch.compiler.set_stance("force_eager"), _listening(lm, counters):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            for counter in counters.values():
                counter.looks_at(classes_V[batch.ids], batch.source)
            here = batch.to(device)
            lm(here.ids, here.positions, here.segments, logits=False)
    found = {name: counter.result() for name, counter in counters.items()}
    return found | {"all": _mean(list(found.values()))}


def token_classes(tokenizer: Tokenizer) -> Tensor:
    """(V,) int64: the place in CLASSES of every id. A token is what its first character that is no
    blank is; text that is not ASCII counts as letters, part of a character as other.
    """
    special = set(tokenizer.added_tokens.values())
    return torch.tensor(
        [
            0 if number in special else TOKEN_CLASSES.index(_class(tokenizer.token_bytes(number)))
            for number in range(tokenizer.vocab_size)
        ]
    )


def mutual_information(counts: Tensor) -> float:
    """Bits that rows tell of columns, or columns of rows, from counts of pairs (C, E)."""
    joint = counts.double() / counts.sum()
    even = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / even).log2()).where(joint > 0, 0).sum().clamp(min=0))


def jaccard_distance(table: Tensor) -> float | None:
    """Mean over pairs of tasks (S, E) of the distance between the sets of experts that each uses
    more than evenly; None where less than two tasks used any.
    """
    used = [row > row.mean() for row in table.double() if bool(row.any())]
    pairs = [_distance(one, other) for one, other in combinations(used, 2)]
    return fmean(pairs) if pairs else None


def _distance(one: Tensor, other: Tensor) -> float:
    """Two empty sets are the same."""
    both = int((one | other).sum())
    return 1 - int((one & other).sum()) / both if both else 0.0


class _Counter:
    """Pairs of a token and an expert of one part, by the token's class and source."""

    def __init__(self, part: Routed, classes: int, sources: int):
        self.part, self._shape = part, (classes, sources)
        self._groups_BT = torch.zeros(0, 0, dtype=torch.long)
        self._table = torch.zeros((), dtype=torch.float64)

    def looks_at(self, classes_BT: Tensor, source_B: Tensor) -> None:
        """What the next tokens are."""
        self._groups_BT = classes_BT * self._shape[1] + source_B[:, None]

    def __call__(self, part: nn.Module, given: tuple[Any, ...]) -> None:
        """Asked before the part works."""
        chosen_NE = self.part.expert_mask(given[0], given[1]).flatten(0, 1).cpu().double()
        empty = chosen_NE.new_zeros(math.prod(self._shape), chosen_NE.shape[1])
        self._table = self._table + empty.index_add(0, self._groups_BT.flatten(), chosen_NE)

    def result(self) -> Specialisation:
        """What was counted, in bits."""
        if not bool(self._table.any()):
            return Specialisation(math.nan, math.nan, None)
        table_CSE = self._table.unflatten(0, self._shape)
        by_class, by_source = table_CSE.sum(1), table_CSE.sum(0)
        entropy = mutual_information(by_class.sum(1).diag())
        return Specialisation(mutual_information(by_class), entropy, jaccard_distance(by_source))


@contextmanager
def _listening(lm: LM, counters: dict[str, _Counter]) -> Iterator[None]:
    hooks = [
        cast(nn.Module, counter.part).register_forward_pre_hook(counter)
        for counter in counters.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mean(found: list[Specialisation]) -> Specialisation:
    reported = [one for one in found if not math.isnan(one.mutual_information)]
    if not reported:
        return Specialisation(math.nan, math.nan, None)
    distances = [one.jaccard for one in reported if one.jaccard is not None]
    return Specialisation(
        fmean(one.mutual_information for one in reported),
        fmean(one.class_entropy for one in reported),
        fmean(distances) if distances else None,
    )


def _class(piece: bytes) -> str:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "other"
    first = text.strip()[:1]
    if not first:
        return "white space" if text else "other"
    kinds = {"letters": first.isalpha() or not first.isascii(), "digits": first.isdigit()}
    return next((name for name, fits in kinds.items() if fits), "punctuation")
