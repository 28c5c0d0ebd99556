"""A training run: model, data, objective, optimizers and log, and its checkpoints.

`TrainerState` holds the position of the run: what changes and is neither a weight nor optimizer
state.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from tinsmith.config import RunConfig, dump
from tinsmith.core import rng
from tinsmith.core.kill_points import kill_point
from tinsmith.core.log import RunLog
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import format_size
from tinsmith.data.loader.loader import TokenizedDataset
from tinsmith.nn.model import LM
from tinsmith.objectives.base import RankLoader
from tinsmith.optim.build import Optimizers
from tinsmith.rewards.model import RewardModel
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import checkpoint, parallel
from tinsmith.train.expert_stats import ExpertStats
from tinsmith.train.fingerprints import check_fingerprints
from tinsmith.train.guard import Guard, LossSpikeDetector
from tinsmith.train.meters import MetricAccumulator, ThroughputMeter
from tinsmith.train.parallel import Ranks
from tinsmith.train.precision import LossScaler


@dataclass
class TrainerState:
    """Position of a run, saved as `state.json`. It holds plain values only."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Tokens seen over all ranks, padding included."""
    best: dict[str, float] | None = None
    """Step and metrics of the evaluation with the lowest loss."""
    evaluation: dict[str, float] | None = None
    """Step and metrics of the newest evaluation."""
    pending: list[str] = field(default_factory=list)
    """Hooks of this step that had not run when the run was stopped. They run after resume."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainerState":
        """Build the state from `to_dict` data. Other keys of the file are ignored."""
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__})


OBJECTIVE_PREFIX = "objective."
"""Key prefix of the objective's tensors in each rank's state file."""


class Interrupted(Exception):
    """A stop was requested during a step or hook. The run is restored to the last complete step."""


class RunParts(NamedTuple):
    """Models, tokenizer and data sets of a run."""

    policy: LM
    """The model to train, adapters included, in training mode."""
    tokenizer: Tokenizer
    source: TokenizedDataset
    validation: TokenizedDataset | None
    frozen_models: dict[str, LM]
    """References and teachers by the names that the objective gives them."""
    reward_models: dict[str, RewardModel]
    """Trained reward models by their folders."""
    data_report: dict[str, Any]
    """`report.json` of the prepared data."""
    fingerprints: dict[str, str]
    """Fingerprints of tokenizer, data and frozen models (`train.fingerprints`)."""


class Run:
    """A training run: models, data, objective, optimizers, log and the state of training."""

    def __init__(
        self,
        config: RunConfig,
        parts: RunParts,
        folder: Path,
        ranks: Ranks,
        log: RunLog,
        stop_flag: StopFlag,
    ):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.log, self.stop_flag = log, stop_flag
        policy = parts.policy
        self.policy, self.tokenizer = policy, parts.tokenizer
        self.source, self.validation = parts.source, parts.validation
        self.data_report, self.fingerprints = parts.data_report, parts.fingerprints
        self.objective = config.objective.build().to(ranks.device)
        self.objective.frozen_models = parts.frozen_models
        self.objective.reward_models = parts.reward_models
        self.objective.peers = self
        self.objective.prepare(policy, parts.tokenizer)
        policy.activation_checkpointing = config.train.activation_checkpointing
        parallel.parallelize(policy, self.objective, ranks)
        if config.train.compile:
            policy.compile()
        self.optimizers = Optimizers.build(policy, self.objective, config.optim)
        self.loader = RankLoader(
            parts.source, config.train.batch_size, ranks.rank, ranks.world_size
        )
        self.batches: Iterator[Any] = self.objective.batches(self.loader, policy)
        self.state = TrainerState()
        self.metrics = MetricAccumulator()
        self.expert_stats = ExpertStats()
        self.guard = Guard(config.train.max_nonfinite_steps)
        self.spike_detector = LossSpikeDetector()
        self.loss_scaler = LossScaler(config.train.precision)
        self.throughput = ThroughputMeter(0)
        self.failed_saves = 0
        self.save_now = False
        rng.seed_all(rng.derive_seed(config.train.seed, "rank", ranks.rank))

    @property
    def checkpoint_dir(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints"

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the optimizers."""
        return list(self.optimizers.parameters())

    def poll(self, busy: bool = False) -> bool:
        """Raise Interrupted on all ranks if a stop was requested on one. Return whether any rank is
        `busy`. Called between micro-batches, generated tokens and evaluation batches.
        """
        kill_point(f"in {self.state.pending[0] if self.state.pending else 'step'}")
        requested = torch.tensor(
            [float(self.stop_flag.stop), float(busy)], device=self.ranks.device
        )
        stop, anybody = self.ranks.all_reduce_sum(requested).tolist()
        if stop:
            raise Interrupted
        return anybody > 0

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Gather the tensors of every rank on the CPU. Shapes may differ."""
        if self.ranks.world_size == 1:
            return [tensors]
        return [
            tensors_of(data) for data in self.ranks.all_gather_bytes(bytes_of(_cpu_copies(tensors)))
        ]

    def build_checkpoint(self) -> checkpoint.Checkpoint:
        """Collect the checkpoint of this step. Every rank must call it."""
        tensors, values = rng.capture()
        rank_state = _cpu_copies(self.objective.rank_state())
        tensors |= {f"{OBJECTIVE_PREFIX}{name}": tensor for name, tensor in rank_state.items()}
        saved = bytes_of(tensors, metadata={"values": json.dumps(values)})
        state = self.state.to_dict() | {
            "cursor": self.loader.cursor,
            "meters": self.metrics.state(),
            "routing": self.expert_stats.state(),
            "guard": self.guard.state(),
            "spikes": self.spike_detector.state(),
            "loss_scale": self.loss_scaler.state(),
            "objective": self.objective.state(),
            "fingerprints": self.fingerprints,
        }
        return checkpoint.Checkpoint(
            parallel.full_tensors(self.policy),
            self.optimizers.state_tensors(),
            parallel.full_tensors(self.objective),
            state,
            self.ranks.all_gather_bytes(saved),
        )

    def save_checkpoint(self) -> bool:
        """Write a checkpoint and delete old ones. Return False if the disk is full."""
        snapshot = self.build_checkpoint()
        problem = ""
        if self.ranks.is_main:
            try:
                folder = checkpoint.save(
                    self.checkpoint_dir, snapshot, self._recipe(), self.tokenizer
                )
                best = self.state.best
                if not self.guard.consecutive:  # this one may be broken: keep the others
                    checkpoint.prune(
                        self.checkpoint_dir,
                        self.config.train.keep,
                        int(best["step"]) if best else None,
                    )
                self.log.line(
                    f" saved  {folder.relative_to(self.folder)} ({format_size(snapshot.nbytes)})"
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

    def _recipe(self) -> str:
        """Return the recipe with the policy's config, so that the checkpoint opens on its own."""
        return dump(replace(self.config, model=self.policy.config))

    def load_checkpoint(self, folder: Path, *, accept_changes: bool = False) -> None:
        """Restore a checkpoint. Training continues to the same bits on as many ranks.

        UserError if tokenizer, data or frozen models are not those of the checkpoint. With
        `accept_changes`, changed data and models are used, and the best evaluation is forgotten.
        """
        saved = checkpoint.load(folder)
        changed = check_fingerprints(
            folder,
            saved.state.get("fingerprints", {}),
            self.fingerprints,
            accept_changes=accept_changes,
        )
        parallel.load_full_tensors(self.policy, saved.model, str(folder))
        parallel.load_full_tensors(self.objective, saved.objective, str(folder))
        self.optimizers.load_state_tensors(saved.optim)
        self.state = TrainerState.from_dict(saved.state)
        if changed:
            self.state.best = None
        self.throughput = ThroughputMeter(self.state.tokens)
        self.loader.cursor = saved.state["cursor"]
        self.metrics.load_state(saved.state["meters"], self.metrics_device)
        self.expert_stats.load_state(saved.state.get("routing", {}), self.metrics_device)
        self.guard.load_state(saved.state["guard"])
        self.spike_detector.load_state(saved.state.get("spikes", []))
        self.loss_scaler.load_state(saved.state["loss_scale"])
        self.objective.load_state(saved.state["objective"])
        self.objective.load_rank_state(self._rank_state(saved.rng))
        self.batches = self.objective.batches(self.loader, self.policy)
        if len(saved.rng) == self.ranks.world_size:
            restore_rng(saved.rng[self.ranks.rank])
        else:
            rng.seed_all(
                rng.derive_seed(self.config.train.seed, "rank", self.ranks.rank, self.state.step)
            )

    def _rank_state(self, files: list[bytes]) -> dict[str, Tensor]:
        """Return this rank's tensors of the objective from the state files of all saved ranks."""
        parts = [
            {
                name.removeprefix(OBJECTIVE_PREFIX): tensor.to(self.ranks.device)
                for name, tensor in tensors_of(data).items()
                if name.startswith(OBJECTIVE_PREFIX)
            }
            for data in files
        ]
        if len(parts) == self.ranks.world_size:
            return parts[self.ranks.rank]
        return self.objective.reshard_rank_state(parts, self.ranks.rank, self.ranks.world_size)

    @property
    def metrics_device(self) -> torch.device:
        """Return the device of float64 sums: the CPU for MPS, which has no float64."""
        return torch.device("cpu") if self.ranks.device.type == "mps" else self.ranks.device


def _cpu_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU. No two of the copies share memory."""
    return {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}


def restore_rng(data: bytes) -> None:
    """Restore the random states of a rank's state file."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    rng.restore(tensors_of(data), json.loads(header["__metadata__"]["values"]))
