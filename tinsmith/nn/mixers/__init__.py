"""The mixers. This union is the list of them: a new one is a file here and one more name below."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.mixers.dsa import DSA
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.mixers.mla import MLA

MixerConfig = Annotated[GQA | MLA | DSA, Kind()]
