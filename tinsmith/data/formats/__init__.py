"""Data formats: what one sample is, and how it becomes tokens. An objective names its format."""

from typing import Literal

from tinsmith.data.formats.answers import Answers
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.formats.chats import Chats
from tinsmith.data.formats.documents import Documents
from tinsmith.data.formats.pairs import Pairs
from tinsmith.data.formats.prompts import Prompts

FormatName = Literal["documents", "chats", "answers", "pairs", "prompts"]

FORMATS: dict[FormatName, DataFormat] = {
    "documents": Documents(),
    "chats": Chats(),
    "answers": Answers(),
    "pairs": Pairs(),
    "prompts": Prompts(),
}
