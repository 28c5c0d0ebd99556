"""What a run trains for. This union is the list of objectives: a new one is a file here and one
more name below.
"""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.objectives.dpo import DPO
from tinsmith.objectives.pretrain import Pretrain
from tinsmith.objectives.reward import Reward
from tinsmith.objectives.sft import SFT

ObjectiveConfig = Annotated[Pretrain | SFT | DPO | Reward, Kind()]
