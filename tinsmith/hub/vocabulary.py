"""Export a tokenizer beside a model: special token ids, and no ids beyond the embedding.

Loading a foreign tokenizer adds Tinsmith's chat tokens after its last id. A model that was not
trained on them may have no embedding rows for them; such tokens are not exported.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.text.specials import END_OF_TEXT
from tinsmith.text.tokenizer import Tokenizer


class SpecialTokenIds(NamedTuple):
    """Token ids that generation needs; without a tokenizer None and empty."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def for_config(self) -> dict[str, Any]:
        """Return keys of config.json. The pad id is omitted: transformers would never train that
        row.
        """
        return {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids) or None}

    def for_generation(self) -> dict[str, Any]:
        """Return the content of generation_config.json."""
        return self.for_config() | {"pad_token_id": self.pad_id}


def special_token_ids(tokenizer: Tokenizer | None, vocab_size: int) -> SpecialTokenIds:
    """Return the special token ids of a tokenizer that are below the model's `vocab_size`."""
    if tokenizer is None:
        return SpecialTokenIds()
    eos_ids = sorted({tokenizer.end_of_text, tokenizer.end_of_turn})
    pad = tokenizer.special(END_OF_TEXT)
    return SpecialTokenIds(
        bos_id=tokenizer.end_of_text if tokenizer.end_of_text < vocab_size else None,
        eos_ids=tuple(token_id for token_id in eos_ids if token_id < vocab_size),
        pad_id=pad if pad < vocab_size else None,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Write a tokenizer's files without the added tokens whose ids are `vocab_size` or more.

    UserError if the base vocabulary is larger than `vocab_size` too.
    """
    tokenizer.save(folder)
    if tokenizer.vocab_size <= vocab_size:
        return
    data = json.loads(tokenizer.to_json())
    exported = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    dropped = [token["content"] for token in data["added_tokens"] if token not in exported]
    data["added_tokens"] = exported
    text = json.dumps(data, ensure_ascii=False, indent=2)
    largest = _largest_id(text)
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


def _largest_id(settings: str) -> int:
    import tokenizers

    vocabulary = tokenizers.Tokenizer.from_str(settings).get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1)
