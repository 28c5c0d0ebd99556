"""From a recipe to a run that can take its first step, or its next one.

Tune glibc's malloc for training on a CPU.
"""

import ctypes
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tinsmith.config import RunConfig
from tinsmith.core import rng
from tinsmith.core.errors import UserError
from tinsmith.core.log import RunLog
from tinsmith.core.parse import to_plain
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import format_count
from tinsmith.data.loader.loader import TokenizedDataset, open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.prepare.prepared import PreparedData
from tinsmith.hub.load import load
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.objectives.frozen import deterministic_adapters, deterministic_config
from tinsmith.text.config import TokenizerConfig
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import checkpoint, parallel, run_dir
from tinsmith.train.frozen import load_frozen_models, load_reward_models
from tinsmith.train.parallel import Ranks
from tinsmith.train.run import Run, check_vocabulary, resize_embeddings, with_config
from tinsmith.train.trackers import attach_trackers


def setup_run(
    config: RunConfig, name: str, flag: StopFlag, *, resume: bool, resume_from: Path | None
) -> Run | None:
    """Everything put together; None where the run is finished already."""
    ranks = parallel.init_distributed(config.parallel.kind, config.train.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if config.train.batch_size % ranks.world_size:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} must be a multiple of the world size "
            f"{ranks.world_size}"
        )
    check_eval_tasks(config)
    place = run_dir.run_folder(name)
    taken = (
        run_dir.create_run_folder(place, resume or resume_from is not None)
        if ranks.is_main
        else True
    )
    ranks.barrier()
    log = RunLog(place, quiet=not ranks.is_main)
    try:
        if taken:
            run_dir.check_resume_config(place, config)
        return _begin(config, place, ranks, log, flag, resume, resume_from)
    except UserError:
        if not taken:  # the name is free for the corrected recipe
            shutil.rmtree(place, ignore_errors=True)
        raise


def check_eval_tasks(config: RunConfig) -> None:
    """UserError where a file of questions that `eval.tasks` names is not there."""
    for task in config.eval.tasks:
        if task != "bpb" and not Path(task).is_file():
            raise UserError(f"eval.tasks: {task} is neither bpb nor a file of questions")


def _begin(
    config: RunConfig,
    place: Path,
    ranks: Ranks,
    log: RunLog,
    flag: StopFlag,
    resume: bool,
    resume_from: Path | None,
) -> Run | None:
    checkpoint.remove_incomplete(place / "checkpoints") if ranks.is_main else None
    found = resume_from or _newest(place, log)
    if resume and found is None:
        log.line(f" resume    {place} has no checkpoint yet: starting from the beginning")
    if found and _finished(place, found, config):
        log.line(f" finished  {place} is already at step {config.train.steps}; nothing to do")
        return None
    if ranks.is_main:
        run_dir.write_config_and_env(place, config, ranks)
    run = _assemble(config, place, ranks, log, flag)
    if found:
        run.load_checkpoint(found)
        run.log.truncate(run.state.step)
        run.log.line(f" resume    from {found} at step {run.state.step}")
    elif ranks.is_main:
        run.log.truncate(0)
    trackers = config.log.trackers if ranks.is_main else ()
    log.closers.append(attach_trackers(trackers, place, to_plain(config), place.name, log))
    return run


def _newest(place: Path, log: RunLog) -> Path | None:
    found, passed_over = checkpoint.latest(place / "checkpoints")
    for reason in passed_over:
        log.line(f" warning {reason}; passed over")
    return found


def _finished(place: Path, found: Path, config: RunConfig) -> bool:
    return (
        found.name == f"step-{config.train.steps:08d}"
        and (place / "final" / "config.json").exists()
    )


def _assemble(config: RunConfig, place: Path, ranks: Ranks, log: RunLog, flag: StopFlag) -> Run:
    lm, tokenizer = _given(config, ranks)
    prepared = prepare_data(config, tokenizer, place.parent / ".data", ranks, log, flag)
    tokenizer = prepared.tokenizer
    rng.seed_all(config.train.seed)
    if lm is None:
        model = resolve_model_config(config)
        check_vocabulary(model.vocab_size, tokenizer)
        lm = LM(model).to(ranks.device)
    else:
        lm = resize_embeddings(lm, tokenizer, log)
    if (adapters := resolve_lora_config(config)) is not None:
        lora.add_adapters(lm, adapters)
    shape, context, seed = config.objective.data_format, config.train.seq_len, config.train.seed
    source = open_dataset(prepared.folder, shape, "train", context, seed)
    validation = _validation(prepared, config)
    frozen = load_frozen_models(config.objective, lm, tokenizer, ranks.device)
    requested = load_reward_models(config.objective, tokenizer, ranks.device)
    reported = (config, place, ranks, log, flag, lm.train(), tokenizer, source, validation)
    run = Run(*reported, frozen, requested)
    run.data_report = prepared.report
    log_header(run)
    return run


def _given(config: RunConfig, ranks: Ranks) -> tuple[LM | None, Tokenizer | None]:
    """Model and tokenizer of `init_from`; what the recipe repeats must agree."""
    if config.init_from is None:
        return None, None
    lm, tokenizer = load(config.init_from, device=str(ranks.device), dtype=torch.float32)
    agreed = resolve_model_config(config, lm.config)
    if agreed != lm.config:  # it acts otherwise in training than its folder says
        lm = with_config(agreed, lm)
    return lm, tokenizer


def resolve_model_config(config: RunConfig, init_config: ModelConfig | None = None) -> ModelConfig:
    """The model that a run trains, as its objective wants it; `given` is that of `init_from`. A
    recipe that repeats it must agree, but for what acts in training only (which tensors are
    trained, dropout, router noise), where it has the last word.
    """
    model = config.model or init_config
    assert model is not None, "a recipe has a model or an init_from"
    repeated = model if init_config is None else replace(model, trainable=init_config.trainable)
    if init_config is not None and deterministic_config(repeated) != deterministic_config(
        init_config
    ):
        raise UserError(
            f"model: differs from that of init_from: {config.init_from}; leave it out, or make "
            "them agree"
        )
    return deterministic_config(model) if config.objective.deterministic else model


def resolve_lora_config(config: RunConfig) -> LoRA | None:
    """The adapters that a run trains, as its objective wants them."""
    if config.lora is None or not config.objective.deterministic:
        return config.lora
    return deterministic_adapters(config.lora)


def prepare_data(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    root: Path,
    ranks: Ranks,
    log: RunLog,
    flag: StopFlag,
) -> PreparedData:
    """The run's shards, made by the first rank where they are missing."""
    wanted = resolve_tokenizer(config, tokenizer)
    shape, context = config.objective.data_format, config.train.seq_len
    if ranks.is_main:
        prepare(config.data, wanted, shape, root, log.line, lambda: flag.stop, seq_len=context)
    ranks.barrier()
    return prepare(
        config.data, wanted, shape, root, lambda line: None, lambda: flag.stop, seq_len=context
    )


def resolve_tokenizer(
    config: RunConfig, init_tokenizer: Tokenizer | None
) -> Tokenizer | TokenizerConfig:
    """What the recipe's text is read with: the tokenizer of `init_from` (`given`), or the
    recipe's own section.
    """
    wanted = config.tokenizer
    if init_tokenizer is None:
        if wanted is None:
            raise UserError(f"tokenizer: {config.init_from} has none; name one")
        return wanted
    if wanted and (
        wanted.path is None
        or Tokenizer.load(wanted.path).fingerprint() != init_tokenizer.fingerprint()
    ):
        raise UserError(
            f"tokenizer: differs from that of init_from: {config.init_from}; leave it out"
        )
    return init_tokenizer


def _validation(prepared: PreparedData, config: RunConfig) -> TokenizedDataset | None:
    if not any(source["validation"]["documents"] for source in prepared.report["sources"]):
        return None
    train = config.train
    return open_dataset(
        prepared.folder, config.objective.data_format, "validation", train.seq_len, train.seed
    )


def log_header(run: Run) -> None:
    """The header: model, data, objective, where the run is."""
    config, train = run.config, run.config.train
    kinds = " + ".join(dict.fromkeys(layer.mixer.kind for layer in run.policy.config.layers))
    feeds = " + ".join(dict.fromkeys(layer.feed_forward.kind for layer in run.policy.config.layers))
    size = format_count(run.policy.parameter_count())
    log = run.log
    log.line(f"  model      {size} params   {kinds} | {feeds} | {run.policy.config.residual.kind}")
    if config.lora is not None:
        log.line(f"  lora       {lora.describe(run.policy, config.lora)}")
    elif count_parameters(run.policy).frozen:
        log.line(f"  frozen     {count_parameters(run.policy)}")
    per_token = run.source.bytes / max(1, run.source.tokens)
    names = " + ".join(run.source.names)
    log.line(
        f"  data       {names}: {format_count(run.source.tokens)} tokens, {per_token:.2f} B/token"
    )
    total = train.steps * train.tokens_per_step
    matrices, others = config.optim.matrices, config.optim.others
    shape = (
        f"{train.steps:,} steps x {train.tokens_per_step:,} tokens = {format_count(total)} tokens"
    )
    epochs = train.steps * train.batch_size * train.grad_accum_steps / run.source.size
    rates = f"{matrices.kind} {matrices.lr:g}, {others.kind} {others.lr:g}"
    rates = f"{rates}, {config.optim.schedule.kind}"
    log.line(f"  objective  {config.objective.kind} | {shape} ({epochs:.2g} epochs) | {rates}")
    log.line(
        f"  machine    {_machine(run.ranks.device)}, {train.precision}, {run.ranks.world_size} "
        "process(es)"
    )
    log.line(f"  run        {run.folder}   continue it with: --name {run.folder.name} --resume")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({os.cpu_count()} cores)"


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

_SHARED = 2**30  # bytes; only larger tensors have pages of their own


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, because the next step allocates the same sizes again.

    By default glibc returns large blocks to the system at once, and getting fresh pages takes a
    tenth of a small model's step on a CPU (LOG.md). With this setting the process keeps its peak
    memory. Other C libraries are not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _SHARED)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
