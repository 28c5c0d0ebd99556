"""Union of all feed-forward configs. A new feed-forward is a file here and a name in the union."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import ReLU2, SwiGLU
from tinsmith.nn.feedforwards.dynmoe import DynMoE
from tinsmith.nn.feedforwards.topk import TopKMoE

FeedForwardConfig = Annotated[SwiGLU | ReLU2 | TopKMoE | DeepSeekMoE | DynMoE, Kind()]
