"""Load the frozen models of an objective: references, teachers and reward models.

Every start and resume loads them again; they are never part of a checkpoint.
"""

import copy

import torch
from safetensors.torch import load_file

from tinsmith.core.errors import UserError
from tinsmith.hub.load import load, locate
from tinsmith.nn import lora
from tinsmith.nn.model import LM
from tinsmith.nn.quant import nbytes, quantize
from tinsmith.objectives import ObjectiveConfig
from tinsmith.rewards.model import RewardModel
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.checkpoint import OBJECTIVE_FILE


def load_frozen_models(
    config: ObjectiveConfig, policy: LM, tokenizer: Tokenizer, device: torch.device
) -> dict[str, LM]:
    """Load the frozen models that the objective names. `policy` must have its weights before the
    first step.

    With LoRA the reference is the policy with adapters disabled (`objectives.frozen`), so no copy
    is made and it is absent from the result. Weights are quantised as the config says. Raise
    UserError if a model has another vocabulary than the policy.
    """
    models = {}
    for name, folder in config.frozen_models().items():
        if folder is None and lora.adapters(policy):
            continue
        lm = copy.deepcopy(policy) if folder is None else _loaded(name, folder, tokenizer, device)
        _check_head(name, lm, policy)
        models[name] = quantize(lm.eval(), config.frozen_weight_dtype())
    return models


def check_frozen_models(
    config: ObjectiveConfig, policy: LM, tokenizer: Tokenizer | None
) -> dict[str, int]:
    """Return the bytes that each frozen model needs. Raise UserError if a folder holds no model, or
    one that reads other ids than `tokenizer` gives (None: not known yet).
    """
    sizes = {}
    for name, folder in config.frozen_models().items():
        if folder is not None:
            lm = _loaded(name, folder, tokenizer, torch.device("cpu"))
            _check_head(name, lm, policy)
            sizes[name] = nbytes(quantize(lm, config.frozen_weight_dtype()))
        elif not lora.adapters(policy):
            sizes[name] = nbytes(policy)
    return sizes


def _check_head(name: str, lm: LM, policy: LM) -> None:
    ids, expected = lm.config.vocab_size, policy.config.vocab_size
    if ids != expected:
        raise UserError(
            f"objective.{name}: its head has {ids} ids and that of this run's model {expected}; "
            "both must have the same model.vocab_size"
        )


def load_reward_models(
    config: ObjectiveConfig, tokenizer: Tokenizer, device: torch.device
) -> dict[str, RewardModel]:
    """Load the reward models that the objective names, by their folders."""
    return {
        folder: load_reward_model(folder, tokenizer, device) for folder in config.reward_models()
    }


def load_reward_model(folder: str, tokenizer: Tokenizer, device: torch.device) -> RewardModel:
    """Load the reward model of a run of `objective: {kind: reward}`, by its folder or one inside.

    Raise UserError if there is none, or if its vocabulary is not that of `tokenizer`.
    """
    lm = _loaded("rewards", folder, tokenizer, device)
    heads = locate(folder) / OBJECTIVE_FILE
    tensors = load_file(heads) if heads.is_file() else {}
    if "head.weight" not in tensors:
        raise UserError(f"{folder}: no reward model; train one with objective: {{kind: reward}}")
    return RewardModel(lm, tensors["head.weight"])


def _loaded(name: str, folder: str, tokenizer: Tokenizer | None, device: torch.device) -> LM:
    lm, own = _opened(name, folder, device)
    if own and tokenizer and own.vocabulary_fingerprint() != tokenizer.vocabulary_fingerprint():
        raise UserError(
            f"objective.{name}: the tokenizer of {folder} gives other ids than this run's; both "
            "models must read the same ids"
        )
    return lm


def _opened(name: str, folder: str, device: torch.device) -> tuple[LM, Tokenizer | None]:
    try:
        return load(folder, device=str(device), dtype=torch.float32)
    except UserError as error:
        raise UserError(f"objective.{name}: {error}") from None
