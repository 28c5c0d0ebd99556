"""The feed-forwards. This union is the list of them: a new one is a file here and one more name
below.
"""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import ReLU2, SwiGLU
from tinsmith.nn.feedforwards.dynmoe import DynMoE
from tinsmith.nn.feedforwards.topk import TopKMoE

FeedForwardConfig = Annotated[SwiGLU | ReLU2 | TopKMoE | DeepSeekMoE | DynMoE, Kind()]
