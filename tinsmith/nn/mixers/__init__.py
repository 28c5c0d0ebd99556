"""Union of all mixer configs. A new mixer is a file here and a name in the union."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.mixers.dsa import DSA
from tinsmith.nn.mixers.dynheads import DynHeads
from tinsmith.nn.mixers.dynlora import DynLoRA
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.mixers.hybrid import Hybrid
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.mixers.nsa import NSA

MixerConfig = Annotated[GQA | MLA | NSA | DSA | Hybrid | DynHeads | DynLoRA, Kind()]
