"""Rollouts: completions sampled by the policy, with the ids, masks and log-probabilities that
reinforcement learning needs, and the tool calls between their turns.

A prompt that occurs several times in a row is prefilled once, and a finished completion makes room
for the next prompt. A token is drawn with a random number that depends on the seed of its rollout
and on its position only, so there is no random state to save, and the batch composition does not
change a rollout. Ids that were sampled are never re-tokenized.

Legend: B rows, T positions; position t predicts the token at t + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import Failure
from tinsmith.core.kill_points import kill_point
from tinsmith.core.rng import derive_seed
from tinsmith.infer.engine import NONFINITE_LOGITS, Engine
from tinsmith.infer.generate import eval_mode
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.chat import Call, Conversation, Message, encode_chat, encode_prompt
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.text.tools import TOOLS, Tool, ToolName, parse_tool_calls, run_tool_call


@dataclass(eq=False)
class Rollout:
    """A prompt, and the tokens of the policy and of tools that follow it."""

    ids: list[int]
    seed: int
    response_mask: list[bool] = field(default_factory=list)
    """True for ids that the policy sampled, including end-of-text and end-of-turn tokens."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of sampled ids at the sampling temperature; 0 for other ids."""
    finish_reason: str | None = None
    """`stop` or `length` of the newest turn. None if there was no room for a turn."""
    turns: int = 0
    prompt_len: int = 0
    """Number of prompt ids."""

    def __post_init__(self) -> None:
        self.prompt_len = len(self.ids)
        self.response_mask, self.logprobs = [False] * self.prompt_len, [0.0] * self.prompt_len

    def append_token(self, token: int, logprob: float) -> None:
        """Append a token that the policy sampled."""
        self.ids.append(token)
        self.response_mask.append(True)
        self.logprobs.append(logprob)

    def append_observation(self, ids: Sequence[int]) -> None:
        """Append ids that the policy did not sample, such as a tool's result. They have no loss."""
        self.ids += ids
        self.response_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    @property
    def completion_ids(self) -> list[int]:
        """All ids after the prompt, including observations."""
        return self.ids[self.prompt_len :]

    @property
    def last_turn_ids(self) -> list[int]:
        """The ids sampled since the last observation."""
        start = len(self.response_mask)
        while start and self.response_mask[start - 1]:
            start -= 1
        return self.ids[start:]


Reply = Callable[[Rollout], Sequence[int]]
"""Returns the observation that follows a finished turn, as ids. No ids end the rollout."""
Poll = Callable[[bool], bool]
"""Called between steps with True if this process has unfinished rollouts; returns True if any
process has.
"""


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """How rollouts are sampled: at most `max_new_tokens` tokens per turn, and `max_seq_len` tokens
    in all.
    """

    max_new_tokens: int
    max_seq_len: int
    batch_size: int = 64
    """Number of rollouts that are sampled at the same time."""
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
    """Sample one rollout per prompt and return them in the same order.

    For several completions of one prompt, repeat it in a row with different seeds. A prompt that
    leaves no room for a token gets no completion. `lm` is put into eval mode meanwhile. The
    log-probabilities are those of the engine: in bf16, and with routers in particular, they differ
    from those of a training forward pass. Raise Failure if the policy's logits are NaN or infinite.
    """
    rollouts = [Rollout(list(ids), seed) for ids, seed in zip(prompts, seeds, strict=True)]
    with eval_mode(lm):
        runner = RolloutRunner(lm, limits, reply)
        for rollout in rollouts:
            runner.submit(rollout)
        while poll(runner.busy):
            kill_point("rollout")
            runner.step()
    return rollouts


class RolloutRunner:
    """Samples the turns of rollouts with an engine."""

    def __init__(self, lm: LM, limits: GenerationLimits, reply: Reply | None):
        max_seq_len = min(limits.max_seq_len, lm.config.max_seq_len)
        self._engine = Engine(
            lm, max_batch_size=limits.batch_size, max_seq_len=max_seq_len, eos_ids=limits.eos_ids
        )
        self._limits, self._reply = limits, reply
        self._running: dict[int, Rollout] = {}

    @property
    def busy(self) -> bool:
        """True while any rollout is unfinished."""
        return bool(self._running)

    def submit(self, rollout: Rollout) -> None:
        """Queue the next turn of a rollout, if there is room for a token."""
        rollout.finish_reason = None
        if len(rollout.ids) >= self._engine.max_seq_len:
            return
        seed = derive_seed(rollout.seed, "turn", rollout.turns)
        params = SamplingParams(temperature=self._limits.temperature, seed=seed)
        request_id = self._engine.add(rollout.ids, params, self._limits.max_new_tokens)
        self._running[request_id] = rollout

    def step(self) -> None:
        """Sample one token of every running rollout, and append the observations after turns that
        ended.
        """
        for event in self._engine.step() if self._running else []:
            rollout = self._running[event.request_id]
            if event.token is None or event.logprob is None:
                raise Failure(f"{NONFINITE_LOGITS} (rollout after {len(rollout.ids)} tokens)")
            rollout.append_token(event.token, event.logprob)
            if event.finish_reason is not None:
                del self._running[event.request_id]
                self._end_turn(rollout, event.finish_reason)

    def _end_turn(self, rollout: Rollout, finish_reason: str) -> None:
        rollout.finish_reason = finish_reason
        rollout.turns += 1
        observation = self._reply(rollout) if self._reply and finish_reason == "stop" else ()
        if observation:
            rollout.append_observation(observation)
            self.submit(rollout)


class ToolRunner:
    """Runs the tool calls of a policy, up to `max_turns` turns per rollout.

    The result of a tool is appended to the ids of the rollout, as the chat template writes it after
    an assistant turn.
    """

    def __init__(self, tokenizer: Tokenizer, names: Sequence[ToolName], max_turns: int):
        self._tokenizer, self._max_turns = tokenizer, max_turns
        self._tools: dict[str, Tool] = {name: TOOLS[name] for name in names}

    def reply(self, rollout: Rollout) -> list[int]:
        """Return the ids of the tools' results after a rollout's newest turn, up to the header of
        the next turn. Return no ids if the turn calls no tool, or if it was the last turn.
        """
        calls = parse_tool_calls(self._tokenizer, rollout.last_turn_ids)
        if not calls or rollout.turns >= self._max_turns:
            return []
        return self.observation_ids([run_tool_call(self._tools, call) for call in calls])

    def observation_ids(self, results: Sequence[str]) -> list[int]:
        """Return the ids that follow an assistant turn: the results, and the next turn's header."""
        call = Call(name="calculator", arguments={})
        question = Message(role="user", content="?")
        turn = Message(role="assistant", content="", calls=(call,) * len(results))
        tool_messages = [Message(role="tool", content=result) for result in results]
        before = encode_chat(self._tokenizer, Conversation(messages=(question, turn)))
        turn_end = len(before.mask) - before.mask[::-1].index(True)
        after = encode_prompt(
            self._tokenizer, Conversation(messages=(question, turn, *tool_messages))
        )
        assert after[:turn_end] == before.ids[:turn_end], "the template changed an earlier turn"
        return after[turn_end:]


class RolloutBatch(NamedTuple):
    """Rollouts as rows, padded on the right, with rewards, advantages and values. Tensors are
    (B, T), except for `rewards` and `truncated`, which are (B,).
    """

    ids: Tensor
    targets: Tensor
    """The next id; 0 after the last one."""
    segments: Tensor
    """0, or -1 for padding."""
    mask: Tensor
    """Response mask of the targets, bool: True for tokens that the policy sampled."""
    sampling_logprobs: Tensor
    """Log-probabilities of the targets by the engine that sampled them; 0 elsewhere."""
    old_logprobs: Tensor
    """Log-probabilities of the targets by a training forward pass of the policy before its first
    step on the rollout (`RLObjective.old_logprobs`); 0 elsewhere.
    """
    rewards: Tensor
    truncated: Tensor
    """True for completions without a stop token, bool."""
    advantages: Tensor
    ref_logprobs: Tensor
    """Log-probabilities of the targets under the reference model; `old_logprobs` without one."""
    values: Tensor
    returns: Tensor

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """Return a copy on `device`, made asynchronously."""
        return RolloutBatch._make(part.to(device, non_blocking=True) for part in self)

    def select_rows(self, index: Tensor) -> "RolloutBatch":
        """Return the rows at `index`, cut to the longest of them."""
        selected = RolloutBatch._make(part[index] for part in self)
        width = int((selected.segments >= 0).sum(1).max())
        return RolloutBatch._make(p[:, :width] if p.dim() == 2 else p for p in selected)


def collate(rollouts: Sequence[Rollout], device: torch.device) -> RolloutBatch:
    """Pad rollouts to a batch. Rewards, advantages, values and returns are 0."""
    width = max(max(len(each.ids) for each in rollouts) - 1, 1)

    def rows(parts: Sequence[Sequence[float]], filler: float, dtype: torch.dtype) -> Tensor:
        padded = [[*part[:width], *[filler] * (width - len(part))] for part in parts]
        return torch.tensor(padded, dtype=dtype, device=device)

    ids = rows([each.ids[:-1] for each in rollouts], 0, torch.long)
    sampled = rows([each.logprobs[1:] for each in rollouts], 0.0, torch.float32)
    zeros, flat = torch.zeros_like(sampled), torch.zeros(len(ids), device=device)
    return RolloutBatch(
        ids=ids,
        targets=rows([each.ids[1:] for each in rollouts], 0, torch.long),
        segments=rows([[0] * (len(each.ids) - 1) for each in rollouts], -1, torch.long),
        mask=rows([each.response_mask[1:] for each in rollouts], False, torch.bool),
        sampling_logprobs=sampled,
        old_logprobs=sampled,
        rewards=flat,
        truncated=torch.tensor([each.finish_reason != "stop" for each in rollouts], device=device),
        advantages=zeros,
        ref_logprobs=sampled,
        values=zeros,
        returns=zeros,
    )


def concat_rollouts(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """Concatenate the rows of several batches, padded to the widest."""
    width = max(part.ids.shape[1] for part in parts)
    padded = []
    for part in parts:
        more = (0, width - part.ids.shape[1])
        wide = [torch.nn.functional.pad(p, more) if p.dim() == 2 else p for p in part]
        filler = torch.nn.functional.pad(part.segments, more, value=-1)
        padded.append(RolloutBatch._make(wide)._replace(segments=filler))
    return RolloutBatch._make(torch.cat(columns) for columns in zip(*padded, strict=True))
