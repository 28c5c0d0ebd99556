"""The sections of a recipe that the trainer reads."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.core.parse import Config, Count


def _at_least_one(config: Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Config):
    """Which checkpoints stay."""

    last: int = 3
    """The newest so many."""
    best: bool = True
    """The best on validation, which is saved as soon as it is found."""
    max_val_loss: float | None = None
    """Where given, only those whose validation loss (nats per token) is below it; the newest
    always stays.
    """

    def __post_init__(self) -> None:
        _at_least_one(self, "last")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How long, how much at a time, how often what."""

    steps: Count = 1000
    seq_len: Count = 256
    """Positions of a row."""
    batch_size: Count = 16
    """Rows of one micro-batch over all ranks."""
    grad_accum_steps: Count = 1
    """Micro-batches of a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
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
    """Steps in a row with NaN or infinity after which training stops."""

    def __post_init__(self) -> None:
        _at_least_one(
            self, "steps", "seq_len", "batch_size", "grad_accum_steps", "max_nonfinite_steps"
        )
        _at_least_one(self, "save_every", "eval_every", "sample_every")

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.seq_len


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Evaluation while training."""

    max_samples: Count = 64
    """Rows of validation data, at most, spread evenly over it."""
    tasks: tuple[str, ...] = ("bpb",)
    """`bpb`, or paths of multiple-choice .jsonl files."""
    prompts: tuple[str, ...] | None = None
    """What samples begin with; by default something that suits the data."""
    max_new_tokens: Count = 48

    def __post_init__(self) -> None:
        _at_least_one(self, "max_samples", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """`ddp` copies the model to every rank of torchrun, `fsdp` spreads it over them."""

    kind: Literal["none", "ddp", "fsdp"] = "none"


@dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """What is said, and to whom."""

    every: Count = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    samples: int = 2
    """Samples shown on the terminal each time; samples.md has them all."""

    def __post_init__(self) -> None:
        _at_least_one(self, "every")
