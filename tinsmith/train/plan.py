"""Resolve a recipe to the plan of a run: model, adapters, tokenizer, precision, device, processes.

`tinsmith train`, `--dry-run` and `tinsmith config show --resolved` start from `resolve`. It reads
configs and tokenizers, never weights or data, so it takes seconds at most. `train.setup` builds the
run from the plan.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.data.formats import FORMATS
from tinsmith.data.prepare.tokenizer import load_tokenizer_or_config
from tinsmith.hub.load import load_config, load_tokenizer
from tinsmith.nn import lora
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM
from tinsmith.objectives.frozen import (
    deterministic_adapters,
    deterministic_config,
    without_router_losses,
)
from tinsmith.text.config import TrainTokenizerConfig
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.parallel import Mesh, pick_device
from tinsmith.train.precision import Precision, fastest_precision


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that decides a run. It is the same on every process.

    Sections of the recipe that resolution does not change (`data`, `objective`, `optim`, `train`,
    ...) are read from `config`.
    """

    config: RunConfig
    """The recipe as written, presets expanded. `config.yaml` of the run stores it."""
    model_config: ModelConfig
    """The model of the recipe or of `init_from`: without dropout and router noise if the objective
    compares old and new log-probabilities, and with an embedding for every id of the tokenizer.
    """
    lora: LoRA | None
    """The adapters to train, without dropout under the same condition."""
    tokenizer: Tokenizer | TrainTokenizerConfig
    """The tokenizer, or how to train one on the data."""
    device: torch.device
    mesh: Mesh
    precision: Precision
    """Precision of autocast: that of the recipe, or the fastest one for `auto`."""

    @property
    def run_config(self) -> RunConfig:
        """The recipe with adapters and precision filled in, as the trainer reads it."""
        train = replace(self.config.train, precision=self.precision)
        return replace(self.config, lora=self.lora, train=train)

    def recipe(self) -> RunConfig:
        """Return the recipe with all decisions filled in. Resolving it gives the same plan."""
        config = self.run_config
        train = replace(config.train, device=str(self.device))
        try:
            return replace(config, model=self.model_config, train=train)
        except ValueError as error:  # a rule that the model of `init_from` breaks
            raise UserError(str(error)) from None

    def with_adapters(self, lm: LM) -> LM:
        """Add the plan's LoRA adapters to `lm` in place, if there are any."""
        if self.lora is not None:
            lora.add_adapters(lm, self.lora)
        return lm

    def meta_policy(self) -> LM:
        """Return the model to train on the meta device: shapes and names without memory."""
        with torch.device("meta"):
            return self.with_adapters(LM(self.model_config))


def resolve(config: RunConfig) -> RunPlan:
    """Decide everything that the recipe leaves open. Read configs and tokenizers, but no weights.

    Raise UserError if the recipe contradicts `init_from`, this machine or the number of processes.
    """
    mesh, device = resolve_devices(config)
    _check_batch_size(config, mesh)
    _check_eval_tasks(config)
    stored = _stored_tokenizer(config)
    tokenizer = _for_data(stored, config)
    model_config = _resolve_model(config, tokenizer)
    precision = config.train.precision
    if precision == "auto":
        precision = fastest_precision(model_config, device, config.train.seq_len)
    plan = RunPlan(
        config=config,
        model_config=model_config,
        lora=_resolve_adapters(config, stored, tokenizer),
        tokenizer=tokenizer,
        device=device,
        mesh=mesh,
        precision=precision,
    )
    plan.recipe()  # the rules of a whole recipe hold for the model of `init_from` too
    return plan


def resolve_devices(config: RunConfig) -> tuple[Mesh, torch.device]:
    """Return the processes of the run and the device of this one."""
    return Mesh.from_environment(config.parallel.kind), pick_device(config.train.device)


def resolve_tokenizer(config: RunConfig) -> Tokenizer | TrainTokenizerConfig:
    """Return the tokenizer of the recipe or of `init_from`, or how to train one.

    The tokens of Tinsmith's chat template are added if the data are conversations and the tokenizer
    has no template. Raise UserError if there is no tokenizer, or if the two give different ids.
    """
    return _for_data(_stored_tokenizer(config), config)


def _for_data(
    tokenizer: Tokenizer | TrainTokenizerConfig, config: RunConfig
) -> Tokenizer | TrainTokenizerConfig:
    data_format = FORMATS[config.objective.data_format]
    chats = any(source.has_conversations(data_format) for source in config.data)
    return tokenizer.for_chats() if chats and isinstance(tokenizer, Tokenizer) else tokenizer


def _stored_tokenizer(config: RunConfig) -> Tokenizer | TrainTokenizerConfig:
    own = load_tokenizer(config.init_from) if config.init_from is not None else None
    if own is None:
        if config.tokenizer is None:
            raise UserError(f"tokenizer: {config.init_from} has none; name one")
        return load_tokenizer_or_config(config.tokenizer)
    if config.tokenizer is None:
        return own
    named = load_tokenizer_or_config(config.tokenizer)
    if (
        not isinstance(named, Tokenizer)
        or named.vocabulary_fingerprint() != own.vocabulary_fingerprint()
    ):
        raise UserError(
            f"tokenizer: has other ids than that of init_from: {config.init_from}; leave it out"
        )
    return named


def resized_vocab_size(vocab_size: int, tokenizer: Tokenizer | TrainTokenizerConfig) -> int:
    """Return the number of embeddings for all ids of the tokenizer."""
    return max(vocab_size, tokenizer.vocab_size)


def check_vocab_size(vocab_size: int, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizer has ids without an embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; raise it"
        )


def _resolve_adapters(
    config: RunConfig,
    stored: Tokenizer | TrainTokenizerConfig,
    tokenizer: Tokenizer | TrainTokenizerConfig,
) -> LoRA | None:
    """Return the adapters to train. Embeddings of tokens that are added to the vocabulary of
    `init_from` are trained too, because frozen rows could never be told apart.
    """
    adapters = config.lora
    if adapters is None:
        return None
    if config.init_from is not None and tokenizer.vocab_size > stored.vocab_size:
        adapters = replace(adapters, trainable_tokens_from=stored.vocab_size)
    if adapters.trainable_tokens_from is not None and config.parallel.kind == "fsdp":
        raise UserError(
            "parallel.kind=fsdp: does not support new token ids, whose embeddings lora trains; use "
            "ddp"
        )
    return deterministic_adapters(adapters) if config.objective.deterministic else adapters


def _resolve_model(config: RunConfig, tokenizer: Tokenizer | TrainTokenizerConfig) -> ModelConfig:
    """Return the config of the model to train, as the objective requires it."""
    model = config.model
    if config.init_from is not None:
        initial = load_config(config.init_from)
        size = resized_vocab_size(initial.vocab_size, tokenizer)
        if model is None:
            model = initial
        else:
            _check_agreement(config.init_from, initial, model, {initial.vocab_size, size})
        model = replace(model, vocab_size=size)
    assert model is not None, "a recipe has a model or an init_from"
    if config.init_from is None and isinstance(tokenizer, Tokenizer):
        check_vocab_size(model.vocab_size, tokenizer)
    if not config.objective.trains_router_losses():
        model = without_router_losses(model)
    return deterministic_config(model) if config.objective.deterministic else model


def _check_agreement(
    init_from: str, initial: ModelConfig, model: ModelConfig, vocab_sizes: set[int]
) -> None:
    """Raise UserError if the recipe's `model` is not that of `init_from`. They may differ in what
    acts in training only: `trainable`, dropout, router noise and weights of router losses.
    """
    alike = replace(model, trainable=initial.trainable)
    if model.vocab_size in vocab_sizes:
        alike = replace(alike, vocab_size=initial.vocab_size)
    if _training_settings_removed(alike) != _training_settings_removed(initial):
        raise UserError(
            f"model: differs from that of init_from: {init_from}; leave it out, or make them agree"
        )


def _training_settings_removed(config: ModelConfig) -> ModelConfig:
    return without_router_losses(deterministic_config(config))


def _check_batch_size(config: RunConfig, mesh: Mesh) -> None:
    """Raise UserError if the batch cannot be divided over the processes."""
    size, processes = config.train.batch_size, mesh.world_size
    if size % processes:
        raise UserError(
            f"train.batch_size: {size} must be a multiple of the world size {processes}"
        )
    config.objective.check_rank_batch(size // processes)


def _check_eval_tasks(config: RunConfig) -> None:
    """Raise UserError if a file of questions that `eval.tasks` names is missing."""
    for task in config.eval.tasks:
        if task != "bpb" and not Path(task).is_file():
            raise UserError(f"eval.tasks: {task} is neither bpb nor a file of questions")
