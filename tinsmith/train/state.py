"""Where a run stands: everything that moves and is neither a weight nor a moment."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class State:
    """Saved as `state.json`, so it holds plain values only."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Positions seen, over all ranks."""
    best: dict[str, float] | None = None
    """Step, loss and other measures of the best evaluation."""
    evaluation: dict[str, float] | None = None
    """The newest evaluation."""
    pending: list[str] = field(default_factory=list)
    """What was still to be done after this step when the run was stopped."""

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "State":
        """From what `plain` gave; other keys of the file are left alone."""
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__})
