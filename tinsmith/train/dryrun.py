"""`--dry-run`: everything that can go wrong, before anything costs time. Writes nothing.

The resolved recipe with the type of every value, a parameter table, cost, memory and disk
estimates, a look at the data, and one real step of the real model on a few random tokens.
"""

import copy
import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.core.files import free_space
from tinsmith.core.log import print_line, print_warning
from tinsmith.core.parse import to_plain
from tinsmith.core.rng import seed_all
from tinsmith.core.units import format_count, format_size
from tinsmith.data.formats import FORMATS
from tinsmith.data.loader.batch import Batch
from tinsmith.data.prepare.scan import check_data
from tinsmith.hub.load import load
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.optim.build import Optimizers
from tinsmith.optim.groups import partition
from tinsmith.optim.schedule import lr_multiplier
from tinsmith.rewards.model import RewardModel
from tinsmith.text.bpe import MIN_VOCAB_SIZE, train_bpe
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.frozen import check_frozen_models
from tinsmith.train.parallel import pick_device
from tinsmith.train.run_dir import run_folder, runs_root
from tinsmith.train.setup import check_eval_tasks, resolve_lora_config, resolve_model_config

MAX_STEP_PARAMS = 1_000_000_000
"""Parameters of a model whose step is still tried."""
STEP_TOKENS = 16


def dry_run(config: RunConfig, name: str) -> None:
    """Print all of it; UserError for the first thing that would stop the run."""
    _recipe(config)
    model = _model_config(config)
    pick_device(config.train.device)
    check_eval_tasks(config)
    config.objective.check_rank_batch(config.train.batch_size)
    with torch.device("meta"):
        shape = LM(model)
        if (adapters := resolve_lora_config(config)) is not None:
            lora.add_adapters(shape, adapters)
    _parameters(shape, config)
    _cost(shape, model, config)
    for line in check_data(config.data, config.objective.data_format):
        print_line(f" data      {line}")
    _disk(shape, config, name)
    if shape.parameter_count() <= MAX_STEP_PARAMS:
        _one_step(model, config)
    else:
        print_warning(
            f"no step was tried: {format_count(shape.parameter_count())} parameters are too many "
            "for a "
            "dry run"
        )
    for frozen_model, held in check_frozen_models(config.objective, shape).items():
        print_line(f" memory    {format_size(held)} more for the {frozen_model}")
    print_line(" dry run   ok; nothing was written")


def _model_config(config: RunConfig) -> ModelConfig:
    if config.init_from is None:
        return resolve_model_config(config)
    lm, _ = load(config.init_from)
    return resolve_model_config(config, lm.config)


def _recipe(config: RunConfig) -> None:
    def show(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                show(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                show(inner, f"{path}.{index}")
        else:
            print_line(f" recipe    {path:<44} {value!r}  ({type(value).__name__})")

    show(to_plain(config), "")


def _parameters(shape: LM, config: RunConfig) -> None:
    total, active = shape.parameter_count(), shape.active_parameter_count()
    idle = "" if active == total else f", of which a token meets {active:,}"
    print_line(f" model     {total:,} parameters{idle}")
    if config.lora is not None:
        print_line(f" lora      {lora.describe(shape, config.lora)}")
    elif count_parameters(shape).frozen:
        print_line(f" frozen    {count_parameters(shape)}")
    for role, members in partition(shape).items():
        if members:
            print_line(
                f" model     {role:<10} {sum(p.numel() for _, p in members):>14,} in "
                f"{len(members)} tensors"
            )


def _cost(shape: LM, model: ModelConfig, config: RunConfig) -> None:
    train = config.train
    forward = shape.flops(train.seq_len)
    total = 3 * forward * train.steps * train.tokens_per_step
    print_line(
        f" cost      {forward / 1e6:.1f} MFLOP per token forward, {total:.2e} FLOP for the run"
    )
    print_line(
        f" memory    about {format_size(estimate_memory(shape, model, config))} (weights, "
        "gradients, moments, activations, logits)"
    )


def estimate_memory(lm: LM, model_config: ModelConfig, config: RunConfig) -> float:
    """Bytes, roughly: 8 per parameter (4 per frozen one), what optimizers remember, and per token
    and layer what a block keeps for its backward pass.
    """
    train = config.train
    tokens = train.batch_size * train.seq_len
    wide = 2 if train.precision != "fp32" else 4
    inside = sum(
        block.feed.flops() / model_config.dim * 0.6 + 10 * model_config.dim for block in lm.blocks
    )
    residuals = [x for b in lm.blocks for x in (b.mix_residual, b.feed_residual)]
    kept = inside * wide + sum(residual.activation_bytes() for residual in residuals)
    if train.activation_checkpointing:
        state = model_config.residual.expand(
            torch.empty(1, 1, model_config.dim, device="meta")
        ).numel()
        kept = 2 * state * len(lm.blocks) * wide + kept / len(lm.blocks)
    held = 4.0 * (lm.parameter_count() + count_parameters(lm).trainable) + _moments(lm, config)
    return held + tokens * kept + 12.0 * 2**23


def _moments(shape: LM, config: RunConfig) -> float:
    """Bytes of optimizer state."""
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
    place = run_folder(name)
    free = free_space(runs_root().resolve())
    print_line(f" output    {place} (shards in {runs_root() / '.data'})")
    print_line(
        f" disk      {kept} checkpoints of {format_size(each)} at most: "
        f"{format_size(kept * each)}; "
        f"{format_size(free)} free"
    )
    if kept * each > free:
        raise UserError(
            f"{place}: the run needs {format_size(kept * each)} and {format_size(free)} are free; "
            "lower "
            "train.keep.last"
        )
    if place.exists():
        print_line(f" output    {place} exists already: choose another --name, or --resume")


def _one_step(model: ModelConfig, config: RunConfig) -> None:
    began = time.monotonic()
    seed_all(config.train.seed)
    lm, objective = LM(model), config.objective.build()
    if (adapters := resolve_lora_config(config)) is not None:
        lora.add_adapters(lm, adapters)
    lm.activation_checkpointing = config.train.activation_checkpointing
    frozen_model = copy.deepcopy(lm).eval().requires_grad_(False)
    objective.frozen_models = dict.fromkeys(config.objective.frozen_models(), frozen_model)
    scorer = RewardModel(frozen_model, torch.zeros(1, model.dim))
    objective.reward_models = dict.fromkeys(config.objective.reward_models(), scorer)
    objective.prepare(lm, _stand_in(model.vocab_size))
    optimizers = Optimizers.build(lm, objective, config.optim)
    generator = torch.Generator().manual_seed(0)
    rows = FORMATS[config.objective.data_format].sequences_per_sample
    ids = torch.randint(0, model.vocab_size, (rows, STEP_TOKENS + 1), generator=generator)
    positions = torch.arange(STEP_TOKENS).expand(rows, STEP_TOKENS)
    everything = torch.ones(rows, STEP_TOKENS, dtype=torch.bool)
    nowhere, source = torch.zeros_like(positions), torch.zeros(rows, dtype=torch.long)
    row = Batch(ids[:, :-1], ids[:, 1:], everything, positions, nowhere, source)
    batch: Any = objective.dummy_batch(row)
    loss = objective.loss(lm, batch)
    units = objective.units(batch)
    (loss.total / units).backward()
    _check_finite(float(loss.total.detach() / units), [*optimizers.parameters()])
    lm.after_backward(loss.grad_probes)
    optimizers.set_lr_multiplier(lr_multiplier(config.optim.schedule, 0, config.train.steps))
    optimizers.step()
    output = f"loss {float(loss.total.detach() / units):.3f}"
    if rows == 1:
        expected = torch.tensor(float(model.vocab_size)).log().item()
        output += f" (ln of {model.vocab_size} ids is {expected:.3f})"
    print_line(
        f" step      one step of {STEP_TOKENS} tokens on the CPU took "
        f"{time.monotonic() - began:.1f} "
        f"s, {output}"
    )


def _check_finite(loss: float, parameters: list[nn.Parameter]) -> None:
    norm = float(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"the first step is not finite: loss {loss:g}, norm of its gradient {norm:g}; look at "
            "the numbers of objective and model, and at the weights of init_from"
        )


def _stand_in(vocab_size: int) -> Tokenizer:
    """A tokenizer that has learned nothing, since the run's own may not have been trained yet."""
    return train_bpe([""], max(vocab_size, MIN_VOCAB_SIZE))
