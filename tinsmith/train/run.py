"""A run put together: data, model, objective, optimizer, log, and where it stands."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from tinsmith.config import RunConfig, dump
from tinsmith.core import rng
from tinsmith.core.errors import UserError
from tinsmith.core.faults import event
from tinsmith.core.log import RunLog
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import size
from tinsmith.data.sources import Source
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.objectives.base import Feed
from tinsmith.objectives.score import Scorer
from tinsmith.optim.build import Optimizers
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import checkpoint, parallel
from tinsmith.train.clock import Clock
from tinsmith.train.guard import Guard, Spikes
from tinsmith.train.meters import Meters
from tinsmith.train.parallel import Ranks
from tinsmith.train.precision import LossScale
from tinsmith.train.routing import RoutingMeter
from tinsmith.train.state import State

CARRIED = "objective."
"""Stands before the names of the objective's tensors in a rank's file of random states."""


class Interrupted(Exception):
    """A stop was asked for in the middle of something; the run is rewound to the last whole
    step.
    """


class Run:
    """Everything that one training run holds."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        ranks: Ranks,
        log: RunLog,
        flag: StopFlag,
        policy: LM,
        tokenizer: Tokenizer,
        source: Source,
        validation: Source | None,
        frozen: dict[str, LM],
        scorers: dict[str, Scorer],
    ):
        self.config, self.folder, self.ranks, self.log, self.flag = config, folder, ranks, log, flag
        self.policy, self.tokenizer = policy, tokenizer
        self.source, self.validation = source, validation
        self.objective = config.objective.build().to(ranks.device)
        self.objective.frozen, self.objective.scorers = frozen, scorers
        self.objective.peers = self
        self.objective.prepare(policy, tokenizer)
        policy.checkpointing = config.train.checkpointing
        parallel.apply(policy, self.objective, ranks)
        if config.train.compile:
            policy.compile()
        self.optimizers = Optimizers.build(policy, self.objective, config.optim)
        self.feed = Feed(source, config.train.rows, ranks.rank, ranks.world)
        self.batches: Iterator[Any] = self.objective.batches(self.feed, policy)
        self.state = State()
        self.meters = Meters()
        self.routing = RoutingMeter()
        self.guard = Guard(config.train.bad_steps)
        self.spikes = Spikes()
        self.scale = LossScale(config.train.precision)
        self.clock = Clock(0)
        self.report: dict[str, Any] = {"sources": []}
        self.failed_saves = 0
        self.save_now = False
        rng.seed_all(rng.derive(config.train.seed, "rank", ranks.rank))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return list(self.optimizers.parameters())

    def poll(self, busy: bool = False) -> bool:
        """Called wherever time is spent; a stop that any rank was asked for interrupts all of
        them. Whether any rank is `busy`.
        """
        event(f"in {self.state.pending[0] if self.state.pending else 'step'}")
        asked = torch.tensor([float(self.flag.stop), float(busy)], device=self.ranks.device)
        stop, anybody = self.ranks.all_sum(asked).tolist()
        if stop:
            raise Interrupted
        return anybody > 0

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, on the CPU; shapes may differ."""
        if self.ranks.world == 1:
            return [tensors]
        return [tensors_of(data) for data in self.ranks.gather(bytes_of(_apart(tensors)))]

    def snapshot(self) -> checkpoint.Snapshot:
        """Everything needed to go on from here; every rank must call it."""
        tensors, values = rng.capture()
        carried = _apart(self.objective.carried())
        tensors |= {f"{CARRIED}{name}": tensor for name, tensor in carried.items()}
        saved = bytes_of(tensors, metadata={"values": json.dumps(values)})
        state = self.state.plain() | {
            "cursor": self.feed.cursor,
            "meters": self.meters.state(),
            "routing": self.routing.state(),
            "guard": self.guard.state(),
            "spikes": self.spikes.state(),
            "loss_scale": self.scale.state(),
            "objective": self.objective.progress(),
        }
        return checkpoint.Snapshot(
            parallel.full_tensors(self.policy),
            self.optimizers.state_tensors(),
            parallel.full_tensors(self.objective),
            state,
            self.ranks.gather(saved),
        )

    def save(self) -> bool:
        """Write a checkpoint and prune old ones; False, after a warning, where the disk is full."""
        snapshot = self.snapshot()
        problem = ""
        if self.ranks.first:
            try:
                folder = checkpoint.save(
                    self.checkpoints, snapshot, self._described(), self.tokenizer
                )
                best = self.state.best
                checkpoint.prune(
                    self.checkpoints, self.config.train.keep, int(best["step"]) if best else None
                )
                self.log.line(
                    f" saved  {folder.relative_to(self.folder)} ({size(snapshot.nbytes)})"
                )
            except checkpoint.DiskFull as error:
                problem = str(error)
        if self.ranks.any(bool(problem)):
            self.failed_saves += 1
            kept = "earlier checkpoints are untouched; free some space"
            self.log.line(f" warning step {self.state.step} could not be saved: {problem}; {kept}")
            return False
        self.failed_saves = 0
        return True

    def _described(self) -> str:
        """The recipe with the model as it is, so that a checkpoint can be opened on its own."""
        return dump(replace(self.config, model=self.policy.config))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, to the same bits."""
        saved = checkpoint.load(folder)
        parallel.load_full_tensors(self.policy, saved.model, str(folder))
        parallel.load_full_tensors(self.objective, saved.objective, str(folder))
        self.optimizers.load_state_tensors(saved.optim)
        self.state = State.read(saved.state)
        self.clock = Clock(self.state.tokens)
        self.feed.cursor = saved.state["cursor"]
        self.meters.restore(saved.state["meters"], self.meter_device)
        self.routing.restore(saved.state.get("routing", {}), self.meter_device)
        self.guard.restore(saved.state["guard"])
        self.spikes.restore(saved.state.get("spikes", []))
        self.scale.restore(saved.state["loss_scale"])
        self.objective.restore_progress(saved.state["objective"])
        self.objective.restore_carried(self._carried(saved.rng))
        self.batches = self.objective.batches(self.feed, self.policy)
        if len(saved.rng) == self.ranks.world:
            restore_rng(saved.rng[self.ranks.rank])
        else:
            rng.seed_all(
                rng.derive(self.config.train.seed, "rank", self.ranks.rank, self.state.step)
            )

    def _carried(self, files: list[bytes]) -> dict[str, Tensor]:
        """The objective's own tensors in the files of all ranks that were, for this one."""
        parts = [
            {
                name.removeprefix(CARRIED): tensor.to(self.ranks.device)
                for name, tensor in tensors_of(data).items()
                if name.startswith(CARRIED)
            }
            for data in files
        ]
        if len(parts) == self.ranks.world:
            return parts[self.ranks.rank]
        return self.objective.shared_out(parts, self.ranks.rank, self.ranks.world)

    @property
    def meter_device(self) -> torch.device:
        """Where sums in float64 live."""
        return torch.device("cpu") if self.ranks.device.type == "mps" else self.ranks.device


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, no two of them in the same memory."""
    return {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}


def restore_rng(data: bytes) -> None:
    """Put back the random states of a rank's file."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    rng.restore(tensors_of(data), json.loads(header["__metadata__"]["values"]))


def grown(lm: LM, tokenizer: Tokenizer, log: RunLog) -> LM:
    """The model with room for every id of the tokenizer: new rows are the mean of the old, a
    multiple of 64 in all.
    """
    old = lm.config.vocab_size
    if tokenizer.vocab_size <= old:
        return lm
    new = math.ceil(tokenizer.vocab_size / 64) * 64
    tensors = lm.state_dict()
    for name in ("embed.weight", "head.weight"):
        rows = tensors[name]
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        tensors[name] = torch.cat((rows, mean.expand(new - old, -1)))
    log.line(
        f"  vocabulary grown from {old} to {new} ids (tokenizer has {tokenizer.vocab_size}); new "
        "rows are the mean"
    )
    return _made(replace(lm.config, vocab_size=new), lm, tensors)


def rebuilt(config: ModelConfig, lm: LM) -> LM:
    """The same weights in a model of `config`, which differs in what acts in training only."""
    return _made(config, lm, lm.state_dict())


def _made(config: ModelConfig, like: LM, tensors: dict[str, Tensor]) -> LM:
    made = LM(config).to(like.embed.weight.device, like.embed.weight.dtype)
    made.load_state_dict(tensors)
    return made


def check_vocabulary(config_vocab: int, tokenizer: Tokenizer) -> None:
    """Every id must have a row."""
    if tokenizer.vocab_size > config_vocab:
        raise UserError(
            f"model.vocab_size: {config_vocab} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; raise it"
        )
