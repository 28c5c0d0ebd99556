"""`--dry-run`: check a recipe and estimate its cost. Nothing is written.

Print the resolved recipe with the type of every value, a table of parameters, estimates of FLOP,
memory and disk, and a check of the data; then train the model for one step on random tokens.
"""

import copy
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.core.files import free_space
from tinsmith.core.log import RunLog, print_line, print_warning
from tinsmith.core.parse import to_plain
from tinsmith.core.rng import seed_all
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import format_count, format_size
from tinsmith.data.formats import FORMATS
from tinsmith.data.loader.loader import DatasetMember, TokenizedDataset
from tinsmith.data.loader.pack import Row
from tinsmith.data.prepare.scan import check_data
from tinsmith.hub.load import load
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.optim.groups import partition
from tinsmith.optim.schedule import lr_multiplier, warmup_warning
from tinsmith.rewards.model import RewardModel
from tinsmith.text.bpe import MIN_VOCAB_SIZE, train_bpe
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.frozen import check_frozen_models
from tinsmith.train.parallel import Ranks
from tinsmith.train.plan import RunPlan, resolve
from tinsmith.train.run import Run, RunParts
from tinsmith.train.run_dir import run_folder, runs_root

MAX_STEP_PARAMS = 1_000_000_000
"""Largest model, in parameters, for which a step is tried."""
STEP_TOKENS = 16


def dry_run(config: RunConfig, name: str) -> None:
    """Resolve the recipe, print the cost of the run, and try one step. Raise UserError for the
    first error that would stop the run.
    """
    plan = resolve(config)
    _recipe(plan)
    if config.init_from is not None:
        load(config.init_from)  # raises if its weights are missing or damaged
    shape = plan.meta_policy()
    for line in parameter_lines(plan, shape):
        print_line(f" {line}")
    _cost(plan, shape)
    warmup = warmup_warning(config.optim.schedule, config.train.steps)
    for warning in filter(None, (warmup, config.optim.others.warning())):
        print_warning(warning)
    for line in check_data(config.data, config.objective.data_format):
        print_line(f" data      {line}")
    _disk(shape, config, name)
    if shape.parameter_count() <= MAX_STEP_PARAMS:
        _one_step(plan, name)
    else:
        print_warning(
            f"no step was tried: {format_count(shape.parameter_count())} parameters are too many "
            "for a dry run"
        )
    tokenizer = plan.tokenizer if isinstance(plan.tokenizer, Tokenizer) else None
    for frozen_model, held in check_frozen_models(config.objective, shape, tokenizer).items():
        print_line(f" memory    {format_size(held)} more for the {frozen_model}")
    print_line(" dry run   ok; nothing was written")


def _recipe(plan: RunPlan) -> None:
    def show(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                show(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                show(inner, f"{path}.{index}")
        else:
            print_line(f" recipe    {path:<44} {value!r}  ({type(value).__name__})")

    show(to_plain(plan.recipe()), "")


def parameter_lines(plan: RunPlan, shape: LM) -> list[str]:
    """Describe the parameters of the policy `shape`: how many, which are trained, and by which
    optimizer. One line each: a key of at most 9 characters, then the text.
    """
    total, active, optim = (
        shape.parameter_count(),
        shape.active_parameter_count(),
        plan.config.optim,
    )
    idle = "" if active == total else f", of which a token meets {active:,}"
    lines = [f"model     {total:,} parameters{idle}"]
    if plan.lora is not None:
        lines.append(f"lora      {lora.describe(shape, plan.lora)}")
    elif count_parameters(shape).frozen:
        lines.append(f"frozen    {count_parameters(shape)}")
    for role, members in partition(shape).items():
        if members:
            kind = (optim.matrices if role == "matrix" else optim.others).kind
            count = sum(p.numel() for _, p in members)
            lines.append(f"model     {role:<10} {count:>14,} in {len(members)} tensors, by {kind}")
    return lines


def _cost(plan: RunPlan, shape: LM) -> None:
    train = plan.config.train
    forward = shape.flops(train.seq_len)
    total = 3 * forward * train.steps * train.tokens_per_step
    print_line(
        f" cost      {forward / 1e6:.1f} MFLOP per token forward, {total:.2e} FLOP for the run"
    )
    memory = estimate_memory(shape, plan.model_config, plan.run_config)
    print_line(
        f" memory    about {format_size(memory)} (weights, gradients, moments, activations, logits)"
    )


def estimate_memory(lm: LM, model_config: ModelConfig, config: RunConfig) -> float:
    """Estimate memory in bytes: 8 per parameter (4 if frozen), optimizer state, and the activations
    that blocks keep for the backward pass, per token and layer.
    """
    train = config.train
    tokens = train.batch_size * train.seq_len
    dtype_bytes = 2 if train.precision != "fp32" else 4
    inside = sum(
        block.feed.flops() / model_config.dim * 0.6 + 10 * model_config.dim for block in lm.blocks
    )
    residuals = [x for b in lm.blocks for x in (b.mix_residual, b.feed_residual)]
    kept = inside * dtype_bytes + sum(residual.activation_bytes() for residual in residuals)
    if train.activation_checkpointing:
        state = model_config.residual.expand(
            torch.empty(1, 1, model_config.dim, device="meta")
        ).numel()
        kept = 2 * state * len(lm.blocks) * dtype_bytes + kept / len(lm.blocks)
    held = 4.0 * (lm.parameter_count() + count_parameters(lm).trainable) + _moments(lm, config)
    return held + tokens * kept + 12.0 * 2**23


def _moments(shape: LM, config: RunConfig) -> float:
    """Return the bytes of optimizer state."""
    sizes = {role: sum(p.numel() for _, p in named) for role, named in partition(shape).items()}
    matrices = sizes.pop("matrix")
    optim = config.optim
    return (
        matrices * optim.matrices.STATE_BYTES_PER_PARAM
        + sum(sizes.values()) * optim.others.STATE_BYTES_PER_PARAM
    )


def _disk(shape: LM, config: RunConfig, name: str) -> None:
    each = 4 * shape.parameter_count() + _moments(shape, config)
    kept = config.train.keep.last + config.train.keep.best + 1
    folder = run_folder(name)
    free = free_space(runs_root().resolve())
    print_line(f" output    {folder} (shards in {runs_root() / '.data'})")
    print_line(
        f" disk      {kept} checkpoints of {format_size(each)} at most: "
        f"{format_size(kept * each)}; "
        f"{format_size(free)} free"
    )
    if kept * each > free:
        raise UserError(
            f"{folder}: the run needs {format_size(kept * each)} and {format_size(free)} are free; "
            "lower "
            "train.keep.last"
        )
    if folder.exists():
        print_line(f" output    {folder} exists already: choose another --name, or --resume")


def _one_step(plan: RunPlan, name: str) -> None:
    began = time.monotonic()
    run = _tiny_run(plan, name)
    policy, vocab_size = run.policy, run.policy.config.vocab_size
    row = next(run.loader)
    batch: Any = run.objective.dummy_batch(row)
    loss = run.objective.loss(policy, batch)
    units = run.objective.units(batch)
    (loss.total / units).backward()
    mean = float(loss.total.detach() / units)
    _check_finite(mean, run.trainable_parameters())
    policy.after_backward(loss.grad_probes)
    run.optimizers.set_lr_multiplier(
        lr_multiplier(plan.config.optim.schedule, 0, plan.config.train.steps)
    )
    run.optimizers.step()
    output = f"loss {mean:.3f}"
    if len(row.ids) == 1:
        expected = torch.tensor(float(vocab_size)).log().item()
        output += f" (ln of {vocab_size} ids is {expected:.3f})"
    print_line(
        f" step      one step of {STEP_TOKENS} tokens on the CPU took "
        f"{time.monotonic() - began:.1f} s, {output}"
    )


def _tiny_run(plan: RunPlan, name: str) -> Run:
    """Build a tiny run of the plan on the CPU: the real model with random weights, and one sample
    of random ids. Copies of the policy take the place of frozen models and reward models.
    """
    objective = plan.config.objective
    run_config = plan.run_config
    train = replace(run_config.train, batch_size=1, seq_len=STEP_TOKENS, compile=False)
    config = replace(run_config, train=train)
    seed_all(train.seed)
    policy = plan.with_adapters(LM(plan.model_config))
    frozen_model = copy.deepcopy(policy).eval().requires_grad_(False)
    scorer = RewardModel(frozen_model, torch.zeros(1, plan.model_config.dim))
    num_rows = FORMATS[objective.data_format].sequences_per_sample
    sample = RandomSample(plan.model_config.vocab_size, num_rows)
    member = DatasetMember("random", 0, 1.0, sample, sample.num_tokens, sample.num_tokens)
    parts = RunParts(
        policy=policy,
        tokenizer=_untrained_tokenizer(plan.model_config.vocab_size),
        source=TokenizedDataset([member], STEP_TOKENS, train.seed, "train"),
        validation=None,
        frozen_models=dict.fromkeys(objective.frozen_models(), frozen_model),
        reward_models=dict.fromkeys(objective.reward_models(), scorer),
        data_report={"sources": []},
        fingerprints={},
    )
    ranks = Ranks(0, 1, torch.device("cpu"), "none")
    return Run(config, parts, run_folder(name), ranks, RunLog(None), StopFlag())


class RandomSample:
    """A data set of one sample of random ids: one row, or the two rows of a pair."""

    size = 1
    num_tokens = STEP_TOKENS
    num_split_chats = num_skipped_pieces = 0

    def __init__(self, vocab_size: int, rows: int):
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, vocab_size, (rows, STEP_TOKENS + 1), generator=generator)

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return the rows, in which every target counts."""
        everything = np.ones(STEP_TOKENS, dtype=np.bool_)
        positions, segments = np.arange(STEP_TOKENS), np.zeros(STEP_TOKENS, dtype=np.int64)
        return tuple(
            Row(ids[:-1], ids[1:], everything, positions, segments) for ids in self._ids.numpy()
        )


def _check_finite(loss: float, parameters: list[nn.Parameter]) -> None:
    norm = float(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"the first step is not finite: loss {loss:g}, norm of its gradient {norm:g}; look at "
            "the numbers of objective and model, and at the weights of init_from"
        )


def _untrained_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer without merges, because the run's own may not be trained yet."""
    return train_bpe([""], max(vocab_size, MIN_VOCAB_SIZE))
