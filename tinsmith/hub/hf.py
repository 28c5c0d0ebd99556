"""Export and import Hugging Face folders; the import is strict and guesses nothing."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_dir, atomic_write, sha256
from tinsmith.core.jsonfile import read_object
from tinsmith.hub.card import CardFacts, model_card
from tinsmith.hub.families.names import NAME_MAPS
from tinsmith.hub.families.rope import with_rope_scaling
from tinsmith.hub.from_hf import config_from_hf
from tinsmith.hub.materialize import materialize
from tinsmith.hub.tensors import find_tensors, save_sharded
from tinsmith.hub.to_hf import config_to_hf
from tinsmith.hub.vocabulary import save_tokenizer, special_token_ids
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.tokenizer import Tokenizer

__all__ = [
    "ExportResult",
    "config_from_hf",
    "config_to_hf",
    "export_folder",
    "import_folder",
    "write_folder",
]

MAX_SHARD_BYTES = 5 * 10**9


class ExportResult(NamedTuple):
    """The outcome of an export; model cards are written from it."""

    family: str
    reason: str | None
    """Why no stock family fits, where `family` is "tinsmith"."""
    parameters: int
    dtype: str
    hashes: dict[str, str]
    """SHA-256 of every weights file, by file name."""


Card = str | Callable[[ExportResult], str]
"""The text of README.md, or a function that returns it after the weights are written."""


def export_folder(
    lm: LM,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    card: Card | None = None,
    extra_files: Sequence[Path] = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Write a model as a Hugging Face folder, atomically, with weights in their own dtype.

    The class is a stock one (Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V3) if it
    computes the same function, otherwise `model_type: tinsmith`. `extra_files` are copied into the
    folder, for example the picture that a card shows. UserError if `folder` exists (unless
    `overwrite`).
    """
    return write_folder(
        lm.config,
        lm.state_dict(),
        tokenizer,
        folder,
        card=card,
        extra_files=extra_files,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )


def write_folder(
    config: ModelConfig,
    state: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    card: Card | None = None,
    extra_files: Sequence[Path] = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    write_extra: Callable[[Path], None] | None = None,
) -> ExportResult:
    """Write a folder as `export_folder` does, from a state dict of full tensors.

    `write_extra` writes more files into the temporary folder before it is renamed to `folder`.
    """
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise UserError(f"{folder}: exists; give the name of a new folder, or remove it first")
    translation = config_to_hf(config)
    names = NAME_MAPS[translation.family]
    tied = {"head.weight"} if config.tie_embeddings else set()
    hf_state = {
        names.to_hf_name(name): names.to_hf_tensor(name, tensor, config)
        for name, tensor in names.split_experts(state).items()
        if name not in tied
    }
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    ids = special_token_ids(tokenizer, config.vocab_size)
    data = translation.data | {"dtype": dtype, "torch_dtype": dtype} | ids.config
    with atomic_dir(folder) as tmp:
        written = save_sharded(tmp, hf_state, max_shard_bytes)
        _write_json(tmp / "config.json", data)
        if tokenizer is not None:
            save_tokenizer(tokenizer, tmp, config)
        _write_json(tmp / "generation_config.json", ids.generation)
        for path in extra_files:
            shutil.copyfile(path, tmp / path.name)
        if write_extra is not None:
            write_extra(tmp)
        result = ExportResult(
            family=translation.family,
            reason=translation.reason,
            parameters=sum(tensor.numel() for tensor in hf_state.values()),
            dtype=dtype,
            hashes={path.name: sha256(path) for path in written},
        )
        atomic_write(tmp / "README.md", _card(card, result, folder.name, tokenizer is not None))
    return result


def _card(card: Card | None, result: ExportResult, name: str, has_tokenizer: bool) -> str:
    if card is None:
        return model_card(CardFacts(name=name, tokenizer=has_tokenizer, **result._asdict()))
    return card if isinstance(card, str) else card(result)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(data, indent=2) + "\n")


def import_folder(
    path: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rope_scaling: dict[str, Any] | None = None,
) -> tuple[LM, Tokenizer | None]:
    """Load a Hugging Face folder of a family in `hub.from_hf`; the model is in eval mode.

    Strict: the folder must hold every tensor of the model in its shape, and no other tensor.
    UserError names the first key, file or tensor that is wrong.
    """
    where = path / "config.json"
    data = read_object(where)
    config = with_rope_scaling(config_from_hf(data, str(where)), rope_scaling)
    family = str(data["model_type"])
    lm = materialize(config, find_tensors(path), NAME_MAPS[family], dtype, device, str(path))
    return lm, open_tokenizer(path)


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder, or None if it has none."""
    is_bpe = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return Tokenizer.load(folder) if is_bpe or (folder / "tokenizer.json").is_file() else None
