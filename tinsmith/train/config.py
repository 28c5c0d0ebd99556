"""Recipe sections of the trainer: `train`, `eval`, `parallel` and `log`."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.core.parse import Config, Count


def _at_least_one(config: Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Config):
    """Which checkpoints are kept when older ones are deleted."""

    last: int = 3
    """Keep this many of the newest checkpoints."""
    best: bool = True
    """Keep the checkpoint with the lowest validation loss. It is saved when it is found."""
    max_val_loss: float | None = None
    """If set, keep only checkpoints with a validation loss (nats per token) below it. The newest is
    always kept.
    """

    def __post_init__(self) -> None:
        _at_least_one(self, "last")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Number of steps, batch size, precision, device and the intervals between hooks."""

    steps: Count = 1000
    seq_len: Count = 256
    """Tokens in a row."""
    batch_size: Count = 16
    """Sequences per micro-batch, over all ranks. Reinforcement learning: prompts per rollout."""
    grad_accum_steps: Count = 1
    """Micro-batches per optimizer step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. `auto` is bf16 if a layer of the model trains faster in it than
    in fp32, which is measured when a run begins and stored in its checkpoints.
    """
    device: str = "auto"
    seed: int = 0
    save_every: Count = 200
    eval_every: Count = 200
    sample_every: Count = 200
    keep: KeepConfig = KeepConfig()
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    max_nonfinite_steps: Count = 10
    """Stop after more than this many steps in a row with a loss or gradient that is not finite."""

    def __post_init__(self) -> None:
        _at_least_one(
            self, "steps", "seq_len", "batch_size", "grad_accum_steps", "max_nonfinite_steps"
        )
        _at_least_one(self, "save_every", "eval_every", "sample_every")

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens per optimizer step over all ranks, padding included."""
        return self.batch_size * self.grad_accum_steps * self.seq_len


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Evaluation during training."""

    max_samples: Count = 64
    """Largest number of validation samples, spread evenly over the data set."""
    tasks: tuple[str, ...] = ("bpb",)
    """`bpb`, or paths of multiple-choice .jsonl files."""
    prompts: tuple[str, ...] | None = None
    """Prompts of the text samples. Default: beginnings of validation samples."""
    max_new_tokens: Count = 48

    def __post_init__(self) -> None:
        _at_least_one(self, "max_samples", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Parallelism over the ranks of torchrun: `ddp` copies the model, `fsdp` shards it."""

    kind: Literal["none", "ddp", "fsdp"] = "none"


@dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """Interval and targets of the log."""

    every: Count = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    samples: int = 2
    """Text samples to print on the terminal. `samples.md` has all of them."""

    def __post_init__(self) -> None:
        _at_least_one(self, "every")
