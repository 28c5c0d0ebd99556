"""A tokenizer beside a model: the ids that end a text, and a vocabulary no larger than the model's.

A foreign tokenizer gets Tinsmith's chat tokens behind its last id when it is loaded; a model that
was never trained on them may have no rows for them. Such tokens are left out of what is exported.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.text.tokenizer import END_OF_TEXT, Tokenizer


class SpecialTokenIds(NamedTuple):
    """Token ids that generation needs; empty and None without a tokenizer."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def for_config(self) -> dict[str, Any]:
        """Keys of config.json. The pad id stays out: transformers would never train that row."""
        return {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids) or None}

    def for_generation(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        return self.for_config() | {"pad_token_id": self.pad_id}


def special_token_ids(tokenizer: Tokenizer | None, vocab_size: int) -> SpecialTokenIds:
    """The ids of a tokenizer's roles, as far as the model has rows for them."""
    if tokenizer is None:
        return SpecialTokenIds()
    ends = sorted({tokenizer.end_of_text, tokenizer.end_of_turn})
    pad = tokenizer.special(END_OF_TEXT)
    return SpecialTokenIds(
        bos_id=tokenizer.end_of_text if tokenizer.end_of_text < vocab_size else None,
        eos_ids=tuple(number for number in ends if number < vocab_size),
        pad_id=pad if pad < vocab_size else None,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Write a tokenizer's files without the added tokens that a model of `vocab_size` rows cannot
    read.

    UserError where the vocabulary proper does not fit either.
    """
    tokenizer.save(folder)
    if tokenizer.vocab_size <= vocab_size:
        return
    data = json.loads(tokenizer.to_json())
    kept = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    dropped = [token["content"] for token in data["added_tokens"] if token not in kept]
    data["added_tokens"] = kept
    text = json.dumps(data, ensure_ascii=False, indent=2)
    largest = _largest(text)
    if largest >= vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small for the tokenizer, whose ids reach {largest}"
        )
    atomic_write(folder / "tokenizer.json", text)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if value not in dropped}
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    if tokenizer.chat_template is None:
        (folder / "chat_template.jinja").unlink()


def _largest(settings: str) -> int:
    import tokenizers

    vocabulary = tokenizers.Tokenizer.from_str(settings).get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1)
