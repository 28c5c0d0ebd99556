"""Union of all objective configs. A new objective is a file here and a name in the union."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.objectives.dpo import DPO
from tinsmith.objectives.eavi import EAVI
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.kd import KD
from tinsmith.objectives.on_policy_kd import OnPolicyKD
from tinsmith.objectives.ppo import PPO
from tinsmith.objectives.pretrain import Pretrain
from tinsmith.objectives.reward import RewardModeling
from tinsmith.objectives.sft import SFT
from tinsmith.objectives.spo import SPO

ObjectiveConfig = Annotated[
    Pretrain | SFT | DPO | RewardModeling | PPO | GRPO | SPO | KD | OnPolicyKD | EAVI, Kind()
]
