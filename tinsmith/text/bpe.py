"""Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes, as GPT-2 does).

Pre-tokenization first splits a text into words, digits, punctuation and whitespace, and merges
never cross a split. Every digit stays a token of its own, because a small model then learns
arithmetic much more easily.
"""

import json
from collections.abc import Iterable

from tinsmith.core.errors import UserError
from tinsmith.text.specials import SPECIALS, TAGS, as_added, our_template
from tinsmith.text.tokenizer import Tokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIALS)
"""Vocabulary size before any merge: 256 bytes plus special tokens."""

_SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word, with the space or sign before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # punctuation, with the line end after it
    r"|\s*[\r\n]+"  # line ends
    r"|\s+(?!\S)"  # whitespace without its last space, which belongs to the next word
    r"|\s+"
)
_CUT_PATTERN = r"[\s\S]{1,256}"
"""Pieces of a word in which pairs are counted: the time to train on a word without a cut is the
square of its length (DNA, scripts without spaces). Shorter words are one piece.
"""


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids: special tokens from id 0 on, all 256 bytes, then
    merges.

    Equal texts give an equal `tokenizer.json`. The vocabulary is smaller than `vocab_size` only if
    no pair is left to merge. Raise UserError if `vocab_size` is too small for special tokens and
    bytes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"tokenizer.train.vocab_size: {vocab_size} is too small; "
            f"bytes and special tokens alone take {MIN_VOCAB_SIZE}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words, cut = (
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in (_SPLIT_PATTERN, _CUT_PATTERN)
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=as_added(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in TAGS  # the trainer marks all of them as special
    return Tokenizer(json.dumps(settings), chat_template=our_template())
