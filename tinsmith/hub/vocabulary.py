"""Export a tokenizer beside a model: special token ids, and no ids beyond the embedding."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.nn.config import ModelConfig
from tinsmith.text.specials import END_OF_TEXT
from tinsmith.text.tokenizer import Tokenizer


class SpecialTokenIds(NamedTuple):
    """Special token ids of a model's folder."""

    config: dict[str, Any]
    """`bos_token_id` and `eos_token_id` of config.json, and `pad_token_id` if the source has it. It
    is not added, because transformers would never train that row.
    """
    generation: dict[str, Any]
    """The content of generation_config.json."""


def special_token_ids(tokenizer: Tokenizer | None, vocab_size: int) -> SpecialTokenIds:
    """Return the special token ids for the folder of a model. Settings of the folder from which
    the tokenizer came are kept; others follow from the roles of its tokens below `vocab_size`.
    """
    if tokenizer is None:
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return SpecialTokenIds({"bos_token_id": None, "eos_token_id": None}, ids)
    _, special_ids, generation = tokenizer.folder_settings
    pad = tokenizer.pad or END_OF_TEXT
    ids = {
        "bos_token_id": _below(vocab_size, tokenizer.added_tokens.get(tokenizer.bos or "")),
        "eos_token_id": [token_id for token_id in tokenizer.eos_ids if token_id < vocab_size],
        "pad_token_id": _below(vocab_size, tokenizer.added_tokens.get(pad)),
    }
    own = {key: (ids | generation)[key] for key in ("bos_token_id", "eos_token_id")}
    return SpecialTokenIds(special_ids or own, generation or ids | special_ids)


def _below(vocab_size: int, token_id: int | None) -> int | None:
    return token_id if token_id is not None and token_id < vocab_size else None


def save_tokenizer(tokenizer: Tokenizer, folder: Path, config: ModelConfig) -> None:
    """Write a tokenizer's files without added tokens that have no embedding in the model.

    UserError if the base vocabulary is larger than the model's too.
    """
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = config.max_seq_len
    data = json.loads(tokenizer.to_json())
    dropped = [t["content"] for t in data["added_tokens"] if t["id"] >= config.vocab_size]
    if tokenizer.vocab_size > config.vocab_size:
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in dropped]
        text = json.dumps(data, ensure_ascii=False, indent=2)
        largest = _largest_id(text)
        if largest >= config.vocab_size:
            raise UserError(
                f"vocab_size={config.vocab_size} is too small for the tokenizer, whose ids reach "
                f"{largest}"
            )
        atomic_write(folder / "tokenizer.json", text)
        settings = {key: value for key, value in settings.items() if value not in dropped}
    atomic_write(path, json.dumps(settings, indent=2) + "\n")


def _largest_id(settings: str) -> int:
    import tokenizers

    vocabulary = tokenizers.Tokenizer.from_str(settings).get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1)
