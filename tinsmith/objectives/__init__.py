"""What a run trains for. This union is the list of objectives: a new one is a file here and one
more name below.
"""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.objectives.kd import KD
from tinsmith.objectives.on_policy_kd import OnPolicyKD
from tinsmith.objectives.pretrain import Pretrain
from tinsmith.objectives.sft import SFT

ObjectiveConfig = Annotated[Pretrain | SFT | KD | OnPolicyKD, Kind()]
