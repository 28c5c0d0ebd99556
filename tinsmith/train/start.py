"""From a recipe to a run that can take its first step, or its next one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tinsmith.config import RunConfig
from tinsmith.core import rng
from tinsmith.core.errors import UserError
from tinsmith.core.log import RunLog
from tinsmith.core.memory import keep_freed_memory
from tinsmith.core.parse import plain
from tinsmith.core.signals import StopFlag
from tinsmith.core.units import count
from tinsmith.data.prepare import prepare
from tinsmith.data.prepared import Prepared
from tinsmith.data.sources import Source, open_source
from tinsmith.hub.load import load
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM
from tinsmith.nn.parts.trained import counts
from tinsmith.objectives.still import still_adapters, still_model
from tinsmith.text.config import TokenizerConfig
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import checkpoint, folder, parallel, track
from tinsmith.train.judges import judges, scorers
from tinsmith.train.parallel import Ranks
from tinsmith.train.run import Run, check_vocabulary, grown, rebuilt


def start(
    config: RunConfig, name: str, flag: StopFlag, *, resume: bool, resume_from: Path | None
) -> Run | None:
    """Everything put together; None where the run is finished already."""
    ranks = parallel.join(config.parallel.kind, config.train.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if config.train.rows % ranks.world:
        raise UserError(
            f"train.rows: {config.train.rows} must be a multiple of the world size {ranks.world}"
        )
    check_questions(config)
    place = folder.run_folder(name)
    taken = folder.claim(place, resume or resume_from is not None) if ranks.first else True
    ranks.barrier()
    log = RunLog(place, quiet=not ranks.first)
    try:
        if taken:
            folder.check_same(place, config)
        return _begin(config, place, ranks, log, flag, resume, resume_from)
    except UserError:
        if not taken:  # the name is free for the corrected recipe
            shutil.rmtree(place, ignore_errors=True)
        raise


def check_questions(config: RunConfig) -> None:
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
    checkpoint.clean(place / "checkpoints") if ranks.first else None
    found = resume_from or _newest(place, log)
    if resume and found is None:
        log.line(f" resume    {place} has no checkpoint yet: starting from the beginning")
    if found and _finished(place, found, config):
        log.line(f" finished  {place} is already at step {config.train.steps}; nothing to do")
        return None
    if ranks.first:
        folder.describe(place, config, ranks)
    run = _assemble(config, place, ranks, log, flag)
    if found:
        run.restore(found)
        run.log.cut(run.state.step)
        run.log.line(f" resume    from {found} at step {run.state.step}")
    elif ranks.first:
        run.log.cut(0)
    trackers = config.log.trackers if ranks.first else ()
    log.closers.append(track.attach(trackers, place, plain(config), place.name, log))
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
    prepared = prepared_for(config, tokenizer, place.parent / ".data", ranks, log, flag)
    tokenizer = prepared.tokenizer
    rng.seed_all(config.train.seed)
    if lm is None:
        model = policy_model(config)
        check_vocabulary(model.vocab_size, tokenizer)
        lm = LM(model).to(ranks.device)
    else:
        lm = grown(lm, tokenizer, log)
    if (adapters := policy_adapters(config)) is not None:
        lora.add(lm, adapters)
    shape, context, seed = config.objective.shape, config.train.context, config.train.seed
    source = open_source(prepared.folder, shape, "train", context, seed)
    validation = _validation(prepared, config)
    frozen = judges(config.objective, lm, tokenizer, ranks.device)
    asked = scorers(config.objective, tokenizer, ranks.device)
    told = (config, place, ranks, log, flag, lm.train(), tokenizer, source, validation)
    run = Run(*told, frozen, asked)
    run.report = prepared.report
    introduce(run)
    return run


def _given(config: RunConfig, ranks: Ranks) -> tuple[LM | None, Tokenizer | None]:
    """Model and tokenizer of `init_from`; what the recipe repeats must agree."""
    if config.init_from is None:
        return None, None
    lm, tokenizer = load(config.init_from, device=str(ranks.device), dtype=torch.float32)
    agreed = policy_model(config, lm.config)
    if agreed != lm.config:  # it acts otherwise in training than its folder says
        lm = rebuilt(agreed, lm)
    return lm, tokenizer


def policy_model(config: RunConfig, given: ModelConfig | None = None) -> ModelConfig:
    """The model that a run trains, as its objective wants it; `given` is that of `init_from`. A
    recipe that repeats it must agree, but for what acts in training only (which tensors are
    trained, dropout, router noise), where it has the last word.
    """
    model = config.model or given
    assert model is not None, "a recipe has a model or an init_from"
    repeated = model if given is None else replace(model, trained=given.trained)
    if given is not None and still_model(repeated) != still_model(given):
        raise UserError(
            f"model: differs from that of init_from: {config.init_from}; leave it out, or make "
            "them agree"
        )
    return still_model(model) if config.objective.still else model


def policy_adapters(config: RunConfig) -> LoRA | None:
    """The adapters that a run trains, as its objective wants them."""
    if config.lora is None or not config.objective.still:
        return config.lora
    return still_adapters(config.lora)


def prepared_for(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    root: Path,
    ranks: Ranks,
    log: RunLog,
    flag: StopFlag,
) -> Prepared:
    """The run's shards, made by the first rank where they are missing."""
    wanted = tokenizer_for(config, tokenizer)
    shape, context = config.objective.shape, config.train.context
    if ranks.first:
        prepare(config.data, wanted, shape, root, log.line, lambda: flag.stop, context=context)
    ranks.barrier()
    return prepare(
        config.data, wanted, shape, root, lambda line: None, lambda: flag.stop, context=context
    )


def tokenizer_for(config: RunConfig, given: Tokenizer | None) -> Tokenizer | TokenizerConfig:
    """What the recipe's text is read with: the tokenizer of `init_from` (`given`), or the
    recipe's own section.
    """
    wanted = config.tokenizer
    if given is None:
        if wanted is None:
            raise UserError(f"tokenizer: {config.init_from} has none; name one")
        return wanted
    if wanted and (
        wanted.path is None or Tokenizer.load(wanted.path).fingerprint() != given.fingerprint()
    ):
        raise UserError(
            f"tokenizer: differs from that of init_from: {config.init_from}; leave it out"
        )
    return given


def _validation(prepared: Prepared, config: RunConfig) -> Source | None:
    if not any(source["validation"]["documents"] for source in prepared.report["sources"]):
        return None
    train = config.train
    return open_source(
        prepared.folder, config.objective.shape, "validation", train.context, train.seed
    )


def introduce(run: Run) -> None:
    """The header: model, data, objective, where the run is."""
    config, train = run.config, run.config.train
    kinds = " + ".join(dict.fromkeys(layer.mixer.kind for layer in run.policy.config.layers))
    feeds = " + ".join(dict.fromkeys(layer.feed_forward.kind for layer in run.policy.config.layers))
    size = count(run.policy.parameter_count())
    log = run.log
    log.line(f"  model      {size} params   {kinds} | {feeds} | {run.policy.config.residual.kind}")
    if config.lora is not None:
        log.line(f"  lora       {lora.described(run.policy, config.lora)}")
    elif counts(run.policy).frozen:
        log.line(f"  frozen     {counts(run.policy)}")
    per_token = run.source.bytes / max(1, run.source.tokens)
    names = " + ".join(run.source.names)
    log.line(f"  data       {names}: {count(run.source.tokens)} tokens, {per_token:.2f} B/token")
    total = train.steps * train.positions
    matrices, others = config.optim.matrices, config.optim.others
    shape = f"{train.steps:,} steps x {train.positions:,} tokens = {count(total)} tokens"
    epochs = train.steps * train.rows * train.accumulate / run.source.size
    rates = f"{matrices.kind} {matrices.lr:g}, {others.kind} {others.lr:g}"
    rates = f"{rates}, {config.optim.schedule.kind}"
    log.line(f"  objective  {config.objective.kind} | {shape} ({epochs:.2g} epochs) | {rates}")
    log.line(
        f"  machine    {_machine(run.ranks.device)}, {train.precision}, {run.ranks.world} "
        "process(es)"
    )
    log.line(f"  run        {run.folder}   continue it with: --name {run.folder.name} --resume")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({os.cpu_count()} cores)"
