"""Set up a run from its plan: folder, log, models and data, ready for its first or next step.

`keep_freed_memory` tunes glibc's malloc for training on a CPU.
"""

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinsmith.config import RunConfig, from_dict
from tinsmith.core import rng
from tinsmith.core.errors import UserError
from tinsmith.core.log import RunLog
from tinsmith.core.parse import to_plain
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import format_count
from tinsmith.core.yamlfile import read_yaml
from tinsmith.data.loader.loader import SplitName, TokenizedDataset, open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.prepare.prepared import PreparedData
from tinsmith.hub.load import load, locate
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.optim.schedule import warmup_warning
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import checkpoint, parallel, run_dir
from tinsmith.train.fingerprints import data_fingerprint, model_fingerprint
from tinsmith.train.frozen import load_frozen_models, load_reward_models
from tinsmith.train.parallel import Ranks
from tinsmith.train.plan import (
    RunPlan,
    check_vocab_size,
    resized_vocab_size,
    resolve,
    resolve_devices,
)
from tinsmith.train.run import Run, RunParts
from tinsmith.train.trackers import attach_trackers


def setup_run(
    config: RunConfig,
    name: str,
    flag: StopFlag,
    *,
    resume: bool,
    resume_from: Path | None,
    accept_changes: bool = False,
) -> Run | None:
    """Claim the folder `name`, resolve the recipe and build the run. Return None if the run is
    finished already; then nothing is resolved, so that `init_from` may be gone.
    """
    folder = run_dir.run_folder(name)
    ranks = parallel.init_distributed(*resolve_devices(config))
    if ranks.device.type == "cpu":
        keep_freed_memory()
    taken = (
        run_dir.create_run_folder(folder, resume or resume_from is not None)
        if ranks.is_main
        else True
    )
    ranks.barrier()
    lock = run_dir.RunLock(folder) if ranks.is_main else None
    log = RunLog(folder, quiet=not ranks.is_main)
    run = None
    try:
        if taken:
            run_dir.check_resume_config(folder, config)
        run = _start(config, folder, ranks, log, flag, resume, resume_from, accept_changes)
    except UserError:
        if not taken:  # the name is free for the corrected recipe
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock and run:
            log.closers.append(lock.release)
        elif lock:
            lock.release()
    return run


def _start(
    config: RunConfig,
    folder: Path,
    ranks: Ranks,
    log: RunLog,
    flag: StopFlag,
    resume: bool,
    resume_from: Path | None,
    accept_changes: bool,
) -> Run | None:
    checkpoint.remove_incomplete(folder / "checkpoints") if ranks.is_main else None
    found = resume_from or _newest(folder, log)
    if resume and found is None:
        log.line(f" resume    {folder} has no checkpoint yet: starting from the beginning")
    if found and _finished(folder, found, config):
        log.line(f" finished  {folder} is already at step {config.train.steps}; nothing to do")
        return None
    plan = resolve(config if found is None else _resumed_recipe(config, found))
    plan = _with_run_precision(plan, found, ranks)
    if found and accept_changes:
        plan = replace(plan, tokenizer=Tokenizer.load(found))
    if ranks.is_main:
        run_dir.write_config_and_env(folder, config, ranks)
    run = build(plan, folder, ranks, log, flag)
    run.config = replace(run.config, init_from=config.init_from)
    if found:
        run.load_checkpoint(found, accept_changes=accept_changes)
        run.log.truncate(run.state.step)
        run.log.line(f" resume    from {found} at step {run.state.step}")
    elif ranks.is_main:
        run.log.truncate(0)
    trackers = config.log.trackers if ranks.is_main else ()
    log.closers.append(attach_trackers(trackers, folder, to_plain(config), folder.name, log))
    return run


def _with_run_precision(plan: RunPlan, found: Path | None, ranks: Ranks) -> RunPlan:
    """Return the plan with the precision that a resumed run began with, or that of rank 0."""
    if plan.config.train.precision != "auto":
        return plan
    precision = plan.precision
    if found is not None and ranks.is_main:
        stored = from_dict(read_yaml(found / "config.yaml"), str(found / "config.yaml"))
        if stored.train.precision != "auto":
            precision = stored.train.precision
    (first, *_) = ranks.all_gather_bytes(precision.encode())
    return replace(plan, precision=first.decode())


def _resumed_recipe(config: RunConfig, found: Path) -> RunConfig:
    """Return the recipe with the checkpoint in place of `init_from`, which may be gone.

    `init_from` is needed only by objectives that keep a copy of the initial policy as reference.
    """
    copies_policy = config.lora is None and None in config.objective.frozen_models().values()
    if config.init_from is None or copies_policy:
        return config
    path = found / "config.yaml"
    return replace(config, init_from=str(found), lora=from_dict(read_yaml(path), str(path)).lora)


def _newest(folder: Path, log: RunLog) -> Path | None:
    found, skipped = checkpoint.latest(folder / "checkpoints")
    for reason in skipped:
        log.line(f" warning {reason}; passed over")
    return found


def _finished(folder: Path, found: Path, config: RunConfig) -> bool:
    return (
        found.name == f"step-{config.train.steps:08d}"
        and (folder / "final" / "config.json").exists()
    )


def build(plan: RunPlan, folder: Path, ranks: Ranks, log: RunLog, flag: StopFlag) -> Run:
    """Load or initialise the weights, prepare the data and build the run of `plan`."""
    config = plan.config
    lm = None if config.init_from is None else _load_init(plan, config.init_from, ranks, log)
    prepared = _prepare_data(plan, folder.parent / ".data", ranks, log, flag)
    tokenizer = prepared.tokenizer
    rng.seed_all(config.train.seed)
    if lm is None:
        check_vocab_size(plan.model_config.vocab_size, tokenizer)
        lm = LM(plan.model_config).to(ranks.device)
    else:
        lm = resize_embeddings(lm, tokenizer, log)
    policy = plan.with_adapters(lm).train()
    frozen = load_frozen_models(config.objective, policy, tokenizer, ranks.device)
    reward_models = load_reward_models(config.objective, tokenizer, ranks.device)
    parts = RunParts(
        policy=policy,
        tokenizer=tokenizer,
        source=_open_split(prepared, "train", config),
        validation=_validation(prepared, config),
        frozen_models=frozen,
        reward_models=reward_models,
        data_report=prepared.report,
        fingerprints={
            "tokenizer": tokenizer.fingerprint(),
            "data": data_fingerprint(prepared),
            **{name: model_fingerprint(lm) for name, lm in frozen.items()},
            **{f"reward model {name}": model_fingerprint(m) for name, m in reward_models.items()},
        },
    )
    run = Run(plan.run_config, parts, folder, ranks, log, flag)
    run.objective.check_data(run.source)
    log_header(run, plan)
    return run


def _load_init(plan: RunPlan, init_from: str, ranks: Ranks, log: RunLog) -> LM:
    """Load the model of `init_from` in float32, with the plan's dropout, noise and `trainable`."""
    folder = locate(init_from)
    lm, _ = load(folder, device=str(ranks.device), dtype=torch.float32)
    log.line(f"  init       from {folder}")
    config = replace(plan.model_config, vocab_size=lm.config.vocab_size)
    return lm if config == lm.config else _rebuild(config, lm, lm.state_dict())


def resize_embeddings(lm: LM, tokenizer: Tokenizer, log: RunLog) -> LM:
    """Add an embedding for every new id of the tokenizer: the mean of the old embeddings."""
    old = lm.config.vocab_size
    new = resized_vocab_size(old, tokenizer)
    if new == old:
        return lm
    tensors = lm.state_dict()
    for name in ("embed.weight", "head.weight"):
        rows = tensors[name]
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        tensors[name] = torch.cat((rows, mean.expand(new - old, -1)))
    log.line(
        f"  vocabulary grown from {old} to {new} ids (tokenizer has {tokenizer.vocab_size}); new "
        "rows are the mean"
    )
    return _rebuild(replace(lm.config, vocab_size=new), lm, tensors)


def _rebuild(config: ModelConfig, like: LM, tensors: dict[str, Tensor]) -> LM:
    """Return a model of `config` with these weights, on the device and in the dtype of `like`."""
    lm = LM(config).to(like.embed.weight.device, like.embed.weight.dtype)
    lm.load_state_dict(tensors)
    return lm


def _prepare_data(
    plan: RunPlan, root: Path, ranks: Ranks, log: RunLog, flag: StopFlag
) -> PreparedData:
    """Prepare the token shards on rank 0 if they are missing, then open them on every rank."""
    config = plan.config

    def prepared(say: Callable[[str], None]) -> PreparedData:
        return prepare(
            config.data,
            plan.tokenizer,
            config.objective.data_format,
            root,
            say,
            lambda: flag.stop,
            seq_len=config.train.seq_len,
        )

    if ranks.is_main:
        prepared(log.line)
    ranks.barrier()
    return prepared(lambda line: None)


def _open_split(prepared: PreparedData, split: SplitName, config: RunConfig) -> TokenizedDataset:
    data_format, train = config.objective.data_format, config.train
    return open_dataset(prepared.folder, data_format, split, train.seq_len, train.seed)


def _validation(prepared: PreparedData, config: RunConfig) -> TokenizedDataset | None:
    if not any(source["validation"]["documents"] for source in prepared.report["sources"]):
        return None
    return _open_split(prepared, "validation", config)


def log_header(run: Run, plan: RunPlan) -> None:
    """Log the first lines of a run: model, data, objective, device and folder."""
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
    if split := run.source.num_split_chats:
        log.line(
            f" warning {split} chats are longer than train.seq_len={train.seq_len}: their rest is "
            "trained in another row, often an answer without its question; raise train.seq_len"
        )
    total = train.steps * train.tokens_per_step
    matrices, others = config.optim.matrices, config.optim.others
    tokens = (
        f"{train.steps:,} steps x {train.tokens_per_step:,} tokens = {format_count(total)} tokens"
    )
    epochs = train.steps * train.batch_size * train.grad_accum_steps / run.source.size
    rates = f"{matrices.kind} {matrices.lr:g}, {others.kind} {others.lr:g}"
    rates = f"{rates}, {config.optim.schedule.kind}"
    log.line(f"  objective  {config.objective.kind} | {tokens} ({epochs:.2g} epochs) | {rates}")
    warnings = (warmup_warning(config.optim.schedule, train.steps), config.optim.others.warning())
    for warning in filter(None, warnings):
        log.line(f" warning {warning}")
    measured = " (auto)" if plan.config.train.precision == "auto" else ""
    log.line(
        f"  machine    {_machine(run.ranks.device)}, {train.precision}{measured}, "
        f"{run.ranks.world_size} process(es)"
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
