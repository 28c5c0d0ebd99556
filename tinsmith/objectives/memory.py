"""The last answer to every prompt, with its log-probabilities when it was given."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.objectives.rollout import Episode, Rollout, collate


class Kept(NamedTuple):
    """One row without its padding: everything (L,)."""

    ids: Tensor
    """int32, without the last id."""
    targets: Tensor
    mask: Tensor
    old: Tensor


class Memory:
    """Answers by the number of their prompt."""

    def __init__(self, kept: Mapping[int, Kept] | None = None):
        self.kept = dict(kept or {})

    def __contains__(self, number: int) -> bool:
        return number in self.kept

    def copy(self) -> "Memory":
        """Another that may learn more; answers are never changed."""
        return Memory(self.kept)

    def keep(self, numbers: Sequence[int], rows: Rollout) -> None:
        """Row i of a rollout is the newest answer to prompt `numbers[i]`."""
        lengths = (rows.segments >= 0).sum(1).tolist()
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            ids, targets, mask, old = (
                part[row, :length].cpu().clone()
                for part in (rows.ids, rows.targets, rows.mask, rows.old)
            )
            self.kept[number] = Kept(ids.int(), targets.int(), mask, old)

    def rows(self, numbers: Sequence[int], device: torch.device) -> Rollout:
        """The answers to these prompts, as rows."""
        return collate([_episode(self.kept[number]) for number in numbers], device)

    def saved(self) -> dict[str, Tensor]:
        """For a checkpoint: `numbers` and `lengths` (N,), and everything else end to end."""
        parts = Kept._make(
            torch.cat([getattr(each, name) for each in self.kept.values()] or [empty])
            for name, empty in zip(Kept._fields, _nothing(), strict=True)
        )
        numbers = torch.tensor(list(self.kept), dtype=torch.int64)
        lengths = torch.tensor([len(each.ids) for each in self.kept.values()], dtype=torch.int64)
        return {"numbers": numbers, "lengths": lengths} | parts._asdict()

    @classmethod
    def loaded(cls, saved: Mapping[str, Tensor]) -> "Memory":
        """The inverse of `saved`."""
        lengths = saved["lengths"].tolist()
        columns = (saved[name].cpu().split(lengths) for name in Kept._fields)
        each = (Kept(*parts) for parts in zip(*columns, strict=True))
        return cls(dict(zip(saved["numbers"].tolist(), each, strict=True)))


def _nothing() -> Kept:
    whole = torch.zeros(0, dtype=torch.int32)
    return Kept(whole, whole, whole.bool(), whole.float())


def _episode(kept: Kept) -> Episode:
    episode = Episode([*kept.ids[:1].tolist(), *kept.targets.tolist()], seed=0)
    episode.said = [False, *kept.mask.tolist()]
    episode.logprobs = [0.0, *kept.old.tolist()]
    return episode
