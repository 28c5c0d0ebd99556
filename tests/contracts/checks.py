"""Steps that several tests of the contract suite share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.contracts.samples import TOKEN_CHOICE_FLOPS, VOCAB
from tests.oracles.close import close_to
from tinsmith.nn.model import LM

close = close_to(1e-10)


def change_after(ids: Tensor, last: int) -> Tensor:
    """Return ids (B, T) with every token after position `last` replaced."""
    changed = ids.clone()
    changed[:, last + 1 :] = (ids[:, last + 1 :] + 7) % VOCAB
    return changed


def assert_causal(lm: LM, ids: Tensor, positions: Iterable[int]) -> None:
    """Assert that later tokens change no logits at or before any of `positions`."""
    before = lm(ids).logits
    for last in positions:
        after = lm(change_after(ids, last)).logits
        close(after[:, : last + 1], before[:, : last + 1])


def decode(lm: LM, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the logits of ids (B, T), computed with a KV cache in calls of `lengths` tokens."""
    assert sum(lengths) == ids.shape[1]
    caches, logits, count = lm.new_caches(*ids.shape), [], 0
    for chunk in ids.split(list(lengths), 1):
        logits.append(lm(chunk, caches=caches).logits)
        count += chunk.shape[1]
        assert all((cache.lengths == count).all() for cache in caches)
    return torch.cat(logits, 1)


def assert_packed_documents_are_isolated(lm: LM, ids: Tensor, runs: list[tuple[int, int]]) -> None:
    """Assert that the documents of one packed row have the logits that they have alone.

    `runs` lists (document or -1 for padding, length).
    """
    segments = torch.tensor([[document for document, length in runs for _ in range(length)]])
    logits = lm(ids, segments=segments).logits[0]
    assert logits.isfinite().all()
    begin = 0
    for document, length in runs:
        end = begin + length
        if document >= 0:
            close(logits[begin:end], lm(ids[:, begin:end]).logits[0])
        begin = end


def pad_rows(pieces: Sequence[Tensor], width: int, side: str) -> tuple[Tensor, Tensor]:
    """Return ids and segments (B, width) of rows of different length, padded at one side."""
    ids = torch.full((len(pieces), width), 3)
    segments = torch.full((len(pieces), width), -1)
    for row, piece in enumerate(pieces):
        columns = slice(width - len(piece), width) if side == "left" else slice(0, len(piece))
        ids[row, columns], segments[row, columns] = piece, 0
    return ids, segments


def assert_checkpointing_changes_no_gradient(lm: LM, ids: Tensor, segments: Tensor | None) -> None:
    """Assert that gradients and stats are equal with and without activation checkpointing, bit
    for bit and with the same dropout.
    """
    gradients, stats = [], []
    real = slice(None) if segments is None else segments >= 0
    lm.train()
    for checkpointing in (False, True):
        lm.zero_grad()
        lm.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        with torch.enable_grad():
            out = lm(ids, segments=segments)
            (out.logits[real].square().sum() + sum(out.losses.values())).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
        stats.append(out.stats)
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert all(torch.equal(value, stats[1][name]) for name, value in stats[0].items())


def assert_flops_are_those_of_torchs_counter(lm: LM, slot: str, kind: str) -> None:
    """Assert that the modules in `slot` (`mixer` or `feed`) count all their matrix products.

    Rows have one token, so that no attention kernel skips masked keys. Claims may exceed the count,
    because torch counts no element-wise operation.
    """
    counts: dict[nn.Module, float] = {}
    for block in lm.blocks:
        module = getattr(block, slot)
        module.forward = _counting(module, counts)
    lm(torch.arange(VOCAB)[:, None])
    for module, counted in counts.items():
        claimed = module.flops(1) if slot == "mixer" else module.flops()
        assert kind in TOKEN_CHOICE_FLOPS or 0.97 <= claimed / (counted / VOCAB) <= 1.2


def _counting(module: nn.Module, counts: dict[nn.Module, float]) -> Any:
    forward = module.forward

    def counting_forward(*arguments: Any, **options: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            out = forward(*arguments, **options)
        counts[module] = counter.get_total_flops()
        return out

    return counting_forward


def _cpu_attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _grouped_flops(x_PI: Any, weight_EOI: Any, *_: Any, **__: Any) -> int:
    return 2 * x_PI[0] * weight_EOI[1] * weight_EOI[2]


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.tinsmith.grouped: _grouped_flops,
}
"""Operators that torch's counter does not know."""
