"""Answers by the policy itself, with all that training needs of them: ids in, ids out.

A prompt that is asked several times in a row is taken in once, and a row that is over makes room
for the next prompt. A token is drawn with a number that depends on its episode's seed and its place
alone, so there is no random state to keep, and it does not matter how rows were batched.

Legend: B rows, T positions; position t predicts the token at t + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.core.kill_points import kill_point
from tinsmith.core.rng import derive_seed
from tinsmith.infer.engine import Engine
from tinsmith.infer.generate import eval_mode
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM


@dataclass(eq=False)
class Rollout:
    """A prompt and what came of it. Ids that were once sampled stay as they are, whatever is
    heard or said later.
    """

    ids: list[int]
    seed: int
    response_mask: list[bool] = field(default_factory=list)
    """Which ids the policy chose, its end-of-text and end-of-turn tokens included."""
    logprobs: list[float] = field(default_factory=list)
    """Of what was said, at the sampling temperature; 0 elsewhere."""
    finish_reason: str | None = None
    """`stop` or `length` of the newest answer; None where there was no room for one."""
    turns: int = 0
    prompt_len: int = 0
    """How many ids were the prompt."""

    def __post_init__(self) -> None:
        self.prompt_len = len(self.ids)
        self.response_mask, self.logprobs = [False] * self.prompt_len, [0.0] * self.prompt_len

    def append_token(self, token: int, logprob: float) -> None:
        """The policy's next token."""
        self.ids.append(token)
        self.response_mask.append(True)
        self.logprobs.append(logprob)

    def append_observation(self, ids: Sequence[int]) -> None:
        """What somebody else says, a tool for example: no part of any loss."""
        self.ids += ids
        self.response_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    @property
    def completion_ids(self) -> list[int]:
        """All ids after the prompt, what was heard included."""
        return self.ids[self.prompt_len :]

    @property
    def last_turn_ids(self) -> list[int]:
        """What was said last, since something was heard."""
        start = len(self.response_mask)
        while start and self.response_mask[start - 1]:
            start -= 1
        return self.ids[start:]


Reply = Callable[[Rollout], Sequence[int]]
"""What is said to a finished answer before the policy goes on; nothing ends the episode."""
Poll = Callable[[bool], bool]
"""Asked between tokens with whether there is still work here; whether there is any anywhere."""


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """How answers are drawn. `max_new_tokens` tokens an answer, `max_seq_len` tokens in all."""

    max_new_tokens: int
    max_seq_len: int
    batch_size: int = 64
    """Answers that are made at the same time."""
    temperature: float = 1.0
    eos_ids: tuple[int, ...] = ()


def generate_rollouts(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    limits: GenerationLimits,
    *,
    reply: Reply | None = None,
    poll: Poll = lambda busy: busy,
) -> list[Rollout]:
    """One episode per prompt, in their order; several answers to one prompt are that prompt several
    times in a row, with other seeds. Prompts that leave no room for an answer get none.

    `lm` is in eval mode meanwhile and as before afterwards; nothing here has a gradient. Call it in
    the precision context of the forward passes that its log-probabilities are compared with.
    """
    episodes = [Rollout(list(ids), seed) for ids, seed in zip(prompts, seeds, strict=True)]
    with eval_mode(lm):
        table = RolloutRunner(lm, limits, reply)
        for episode in episodes:
            table.submit(episode)
        while poll(table.busy):
            kill_point("rollout")
            table.step()
    return episodes


class RolloutRunner:
    """Episodes that an engine is at work on."""

    def __init__(self, lm: LM, limits: GenerationLimits, reply: Reply | None):
        room = min(limits.max_seq_len, lm.config.max_seq_len)
        self._engine = Engine(
            lm, max_batch_size=limits.batch_size, max_seq_len=room, eos_ids=limits.eos_ids
        )
        self._limits, self._reply = limits, reply
        self._running: dict[int, Rollout] = {}

    @property
    def busy(self) -> bool:
        """True while any rollout is unfinished."""
        return bool(self._running)

    def submit(self, episode: Rollout) -> None:
        """Let the policy speak, if there is room for a word."""
        episode.finish_reason = None
        if len(episode.ids) >= self._engine.max_seq_len:
            return
        seed = derive_seed(episode.seed, "turn", episode.turns)
        sampling = SamplingParams(temperature=self._limits.temperature, seed=seed)
        number = self._engine.add(episode.ids, sampling, self._limits.max_new_tokens)
        self._running[number] = episode

    def step(self) -> None:
        """A token for every row, and what is said to answers that are over."""
        for token in self._engine.step() if self._running else []:
            episode = self._running[token.request_id]
            episode.append_token(token.token, token.logprob)
            if token.finish_reason is not None:
                del self._running[token.request_id]
                self._end(episode, token.finish_reason)

    def _end(self, episode: Rollout, finish: str) -> None:
        episode.finish_reason = finish
        episode.turns += 1
        received = self._reply(episode) if self._reply and finish == "stop" else ()
        if received:
            episode.append_observation(received)
            self.submit(episode)


class RolloutBatch(NamedTuple):
    """Episodes as rows, padded on the right, and what an objective makes of them. All (B, T) but
    `rewards` and `truncated`, which are (B,).
    """

    ids: Tensor
    targets: Tensor
    """The id that follows; 0 where there is none."""
    segments: Tensor
    """0, or -1 for padding."""
    mask: Tensor
    """Which targets the policy chose and is to learn from, bool."""
    old_logprobs: Tensor
    """Their log-probabilities when they were sampled; 0 elsewhere."""
    rewards: Tensor
    truncated: Tensor
    """Whether the answer has no end, bool."""
    advantages: Tensor
    ref_logprobs: Tensor
    """What the reference says of the targets; `old_logprobs` where nothing is compared with it."""
    values: Tensor
    returns: Tensor

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """The same on `device`, without waiting for the copy."""
        return RolloutBatch._make(part.to(device, non_blocking=True) for part in self)

    def select_rows(self, index: Tensor) -> "RolloutBatch":
        """Some rows, as wide as their longest."""
        chosen = RolloutBatch._make(part[index] for part in self)
        width = int((chosen.segments >= 0).sum(1).max())
        return RolloutBatch._make(p[:, :width] if p.dim() == 2 else p for p in chosen)


def collate(episodes: Sequence[Rollout], device: torch.device) -> RolloutBatch:
    """Rows of episodes, with nothing made of them yet: rewards, advantages and values are 0."""
    width = max(max(len(each.ids) for each in episodes) - 1, 1)

    def rows(parts: Sequence[Sequence[float]], filler: float, dtype: torch.dtype) -> Tensor:
        padded = [[*part[:width], *[filler] * (width - len(part))] for part in parts]
        return torch.tensor(padded, dtype=dtype, device=device)

    ids = rows([each.ids[:-1] for each in episodes], 0, torch.long)
    old = rows([each.logprobs[1:] for each in episodes], 0.0, torch.float32)
    zeros, flat = torch.zeros_like(old), torch.zeros(len(ids), device=device)
    return RolloutBatch(
        ids=ids,
        targets=rows([each.ids[1:] for each in episodes], 0, torch.long),
        segments=rows([[0] * (len(each.ids) - 1) for each in episodes], -1, torch.long),
        mask=rows([each.response_mask[1:] for each in episodes], False, torch.bool),
        old_logprobs=old,
        rewards=flat,
        truncated=torch.tensor([each.finish_reason != "stop" for each in episodes], device=device),
        advantages=zeros,
        ref_logprobs=old,
        values=zeros,
        returns=zeros,
    )


def concat_rollouts(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """The rows of several, one after the other."""
    width = max(part.ids.shape[1] for part in parts)
    padded = []
    for part in parts:
        more = (0, width - part.ids.shape[1])
        wide = [torch.nn.functional.pad(p, more) if p.dim() == 2 else p for p in part]
        filler = torch.nn.functional.pad(part.segments, more, value=-1)
        padded.append(RolloutBatch._make(wide)._replace(segments=filler))
    return RolloutBatch._make(torch.cat(columns) for columns in zip(*padded, strict=True))
