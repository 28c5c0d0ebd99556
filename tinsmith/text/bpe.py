"""Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes, as GPT-2 does).

A text is first cut into words, digits, signs and blanks; merges never cross a cut. Every digit
stays a token of its own, because arithmetic is so much easier to learn for a small model.
"""

import json
from collections.abc import Iterable

from tinsmith.core.errors import UserError
from tinsmith.text.specials import SPECIALS, TAGS, as_added
from tinsmith.text.tokenizer import Tokenizer

SMALLEST = 256 + len(SPECIALS)
"""Ids of a vocabulary that has merged nothing."""

_CUTS = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word, with the blank or sign before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # signs, with the line's end after them
    r"|\s*[\r\n]+"  # ends of lines
    r"|\s+(?!\S)"  # blanks, but for the last one, which belongs to the next word
    r"|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` ids from texts: specials from id 0 on, all 256 bytes, then merges.

    Deterministic: equal texts give an equal `tokenizer.json`. Fewer ids come out only where no
    pair is left to merge. UserError where `vocab_size` has no room for specials and bytes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise UserError(
            f"tokenizer.train.vocab_size: {vocab_size} is too small; "
            f"bytes and special tokens alone take {SMALLEST}"
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=as_added(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    settings = json.loads(learner.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in TAGS  # the trainer makes all of them special
    return Tokenizer(json.dumps(settings))
