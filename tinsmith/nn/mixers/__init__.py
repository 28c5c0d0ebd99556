"""The mixers. This union is the list of them: a new one is a file here and one more name below."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.mixers.nsa import NSA

MixerConfig = Annotated[GQA | NSA, Kind()]
