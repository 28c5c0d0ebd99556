"""What experts did since the last line, for `metrics.jsonl` (lines of kind `routing`), the terminal
and the heat map.

Layers say sums (`Out.stats`); they are added over micro-batches, ranks and steps, and means are
formed once. Of every layer, by "layer.slot":

| name | meaning |
|---|---|
| load | [E] share of the tokens that each expert works on, before any fallback |
| active | experts per token: the sum of load |
| peak | the largest load over the mean one; 1 is even |
| dead | experts without a token |
| entropy | nats, mean over tokens of what their gates say |
| fallback | share of tokens that no expert fired for |
| surprise | of pairs of a token and an expert that worked on it: S over the token's |g| |
| alike | correlation of S with the size of what an expert says |
| dark | share of tokens whose least surprised expert says nothing |
| router | the loss a gate learns from surprise |
| others | what a layer says beside, mean over tokens: losses before their coefficients |
| thresholds, bias | [E] as they stand at the line |
| drift | the mean size of these; they begin at 0 |

and of the whole model the same numbers as means over the layers that tell them, but peak as the
largest, dead and experts as sums. Tokens are those that are no padding.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinsmith.core.log import Metrics
from tinsmith.nn.model import LM
from tinsmith.train.meters import to_float64

DENOMINATORS = {
    "surprise": "pairs",
    "inactive_fraction": "compared",
    "surprise_norm_corr": "compared",
    "router_loss": "router_tokens",
}
"""What a sum is a sum over, where that is not "tokens"."""
SIGNIFICANT_DIGITS = 5


class ExpertStats:
    """Sums of statistics by "layer.slot.name", in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add what all layers of all ranks said of one step."""
        for name, value in stats.items():
            if value.dim() and not name.endswith(".load"):
                continue
            self.sums[name] = (
                self.sums[name] + to_float64(value) if name in self.sums else to_float64(value)
            )

    def pop_metrics(self, lm: LM) -> Metrics:
        """What there is to tell, and begin anew; empty where nothing was routed. Every rank must
        call it.
        """
        sums, self.sums = self.sums, {}
        layers: dict[str, dict[str, Any]] = {}
        for name, part in lm.routed_modules().items():
            mine = {key: sums[f"{name}.{key}"] for key in _reported(sums, name)}
            if "load" in mine and float(mine["tokens"]):
                layers[name] = _layer(mine) | _drifted(part.router_state())
        return _whole(layers) | {"layers": layers} if layers else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: value.tolist() for name, value in sorted(self.sums.items())}

    def load_state(self, saved: dict[str, Any], device: torch.device) -> None:
        """Put back what `state` gave."""
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in saved.items()
        }


def format_line(metrics: Metrics) -> str:
    """One short line of what `RoutingMeter.take` gave."""
    parts = [f"active {metrics['active']:.2f}", f"dead {metrics['dead']}/{metrics['experts']}"]
    parts += [f"peak {metrics['max_load_ratio']:.1f}"]
    parts += [f"{name} {metrics[name]:.2g}" for name in ("entropy", "drift") if name in metrics]
    if "fallback" in metrics:
        parts.append(f"fallback {100 * metrics['fallback']:.1f} %")
    return "  ".join(parts)


def _reported(sums: dict[str, Tensor], layer: str) -> Iterable[str]:
    start = f"{layer}."
    return [name.removeprefix(start) for name in sums if name.startswith(start)]


def _layer(sums: dict[str, Tensor]) -> dict[str, Any]:
    load = sums["load"]
    found: dict[str, Any] = {
        "active": _round(load.sum() / sums["tokens"]),
        "max_load_ratio": _round(load.max() / load.mean().clamp(min=1e-300)),
        "dead": int((load == 0).sum()),
    }
    for key in sums.keys() - {"tokens", *DENOMINATORS.values()}:
        count = sums[DENOMINATORS.get(key, "tokens")]
        found |= {key: _round(sums[key] / count)} if float(count) else {}
    return dict(sorted(found.items()))


def _drifted(watched: dict[str, Tensor]) -> dict[str, Any]:
    whole = {
        key: value.full_tensor() if isinstance(value, DTensor) else value.detach()
        for key, value in watched.items()
    }
    reported = {key: _round(value) for key, value in whole.items()}
    sizes = [float(to_float64(value).abs().mean()) for value in whole.values()]
    return reported | ({"drift": _short(fmean(sizes))} if sizes else {})


def _whole(layers: dict[str, dict[str, Any]]) -> Metrics:
    each = list(layers.values())
    found: Metrics = {
        "experts": sum(len(layer["load"]) for layer in each),
        "dead": sum(layer["dead"] for layer in each),
        "max_load_ratio": max(layer["max_load_ratio"] for layer in each),
    }
    keys = dict.fromkeys(key for layer in each for key in layer)
    for key in keys:
        values = [layer[key] for layer in each if key in layer]
        if key not in found and not any(isinstance(value, list) for value in values):
            found[key] = _short(fmean(values))
    return found


def _round(value: Tensor) -> Any:
    """A number or a list of them, of as many digits as are worth keeping."""
    plain = value.tolist()
    return [_short(one) for one in plain] if isinstance(plain, list) else _short(plain)


def _short(number: float) -> float:
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")
