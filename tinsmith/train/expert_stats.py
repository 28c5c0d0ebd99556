"""Statistics of experts since the last log line, for `metrics.jsonl` (kind `routing`), terminal and
heat map.

Layers return sums (`Out.stats`), which are added over micro-batches, ranks and steps. Means are
computed once. The keys of every layer, by "layer.slot":

| name | meaning |
|---|---|
| load | [E] share of the tokens that each expert works on, before any fallback |
| active | experts per token: the sum of load |
| max_load_ratio | the largest load over the mean one; 1 is balanced |
| dead | experts without a token |
| entropy | entropy of the router in nats, mean over tokens |
| fallback | share of tokens for which no expert was above its threshold |
| surprise | S over |g| of the token, mean over (token, expert) pairs |
| surprise_norm_corr | correlation of S with the norm of the expert's output |
| inactive_fraction | share of tokens whose expert of least surprise has an output near zero |
| router_loss | the loss of a router that learns from surprise |
| others | other statistics of a layer, mean over tokens: losses before their coefficients |
| thresholds, bias | [E] their current values |
| drift | the mean magnitude of these; they start at 0 |

The whole model has the same keys as means over layers, except max_load_ratio (maximum), and dead
and experts (sums). Padding is not counted as tokens.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tinsmith.core.log import Metrics
from tinsmith.distributed.dtensor import full_tensor
from tinsmith.nn.model import LM
from tinsmith.train.meters import to_float64

DENOMINATORS = {
    "surprise": "pairs",
    "inactive_fraction": "compared",
    "surprise_norm_corr": "compared",
    "router_loss": "router_tokens",
}
"""The count to divide a sum by, if it is not "tokens"."""
SIGNIFICANT_DIGITS = 5


class ExpertStats:
    """Sums of statistics by "layer.slot.name", in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add the sums of one step over all layers and ranks."""
        for name, value in stats.items():
            if value.dim() and not name.endswith(".load"):
                continue
            self.sums[name] = (
                self.sums[name] + to_float64(value) if name in self.sums else to_float64(value)
            )

    def pop_metrics(self, lm: LM) -> Metrics:
        """Return metrics (empty without experts) and reset the sums. Every rank must call it."""
        sums, self.sums = self.sums, {}
        layers: dict[str, dict[str, Any]] = {}
        for name, part in lm.routed_modules().items():
            own = {key: sums[f"{name}.{key}"] for key in _reported(sums, name)}
            if "load" in own and float(own["tokens"]):
                layers[name] = _layer(own) | _drifted(part.router_state())
        return _whole(layers) | {"layers": layers} if layers else {}

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {name: value.tolist() for name, value in sorted(self.sums.items())}

    def load_state(self, saved: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in saved.items()
        }


def format_line(metrics: Metrics) -> str:
    """Format the metrics of `pop_metrics` as one short line."""
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


def _drifted(router_state: dict[str, Tensor]) -> dict[str, Any]:
    whole = {key: full_tensor(value).detach() for key, value in router_state.items()}
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
    """Round a number or a list of numbers to `SIGNIFICANT_DIGITS`."""
    plain = value.tolist()
    return [_short(one) for one in plain] if isinstance(plain, list) else _short(plain)


def _short(number: float) -> float:
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")
