"""The vocabulary of grids: 18 ids, a WordLevel `tokenizer.json` that transformers opens too.

    0 to 9    the colours, written as digits       14  pad: fills rows, never a colour
    10, 11    begin and end of a turn              15  a new line between the rows of a grid
    12, 13    an input comes, an output comes      16, 17  begin and end of a whole task

A grid is text: digits, and a new line between rows. All else is a special id.
"""

from tinsmith.text.specials import END_OF_TEXT, END_OF_TURN, PAD, START_OF_TURN
from tinsmith.text.tokenizer import Tokenizer

COLOURS = 10
PROBLEM, SOLUTION = "<|problem|>", "<|solution|>"
START_OF_TEXT = "<|startoftext|>"
NAMES = (
    *map(str, range(COLOURS)),
    *(START_OF_TURN, END_OF_TURN, PROBLEM, SOLUTION, PAD, "\n", START_OF_TEXT, END_OF_TEXT),
)
"""The symbols in the order of their ids."""


def grid_tokenizer() -> Tokenizer:
    """The tokenizer of grids. Text of anything but digits and new lines is refused."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    made = tokenizers.Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(NAMES)}, unk_token=PAD)
    )
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([name for name in NAMES if len(name) > 1])
    return Tokenizer(made.to_str(), bos=START_OF_TEXT)
