"""Vocabulary of ARC grids: 18 ids in a WordLevel `tokenizer.json` that transformers opens too.

    0 to 9    the colours, written as digits       14  pad: fills rows, never a colour
    10, 11    begin and end of a turn              15  a new line between the rows of a grid
    12, 13    before an input, before an output    16, 17  begin and end of a whole task

The text of a grid is digits with a new line between rows. Everything else is a special id.
"""

from tinsmith.text.specials import END_OF_TEXT, END_OF_TURN, PAD, START_OF_TURN, our_template
from tinsmith.text.tokenizer import Tokenizer

NUM_COLOURS = 10
PROBLEM, SOLUTION = "<|problem|>", "<|solution|>"
START_OF_TEXT = "<|startoftext|>"
SYMBOLS = (
    *map(str, range(NUM_COLOURS)),
    *(START_OF_TURN, END_OF_TURN, PROBLEM, SOLUTION, PAD, "\n", START_OF_TEXT, END_OF_TEXT),
)
"""Symbols in the order of their ids."""


def grid_tokenizer() -> Tokenizer:
    """Make the grid tokenizer. It raises UserError for text other than digits and new lines."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({name: token_id for token_id, name in enumerate(SYMBOLS)}, unk_token=PAD)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([name for name in SYMBOLS if len(name) > 1])
    return Tokenizer(tokenizer.to_str(), bos=START_OF_TEXT, chat_template=our_template())
