"""Mean 0 and deviation 1 over everything that all processes have in hand."""

import torch
from torch import Tensor

from tinsmith.objectives.base import Peers


def whitened(values: Tensor, mask: Tensor, peers: Peers) -> Tensor:
    """(values - mean) / (population deviation + 1e-8) over masked-in values of all processes; 0
    where masked. Any shape; `mask` of the same.
    """
    own = torch.where(mask, values, 0).double()
    parts = peers.gather({"values": values[mask].double()})
    known = torch.cat([part["values"].to(own.device) for part in parts])
    if not len(known):
        return torch.zeros_like(values)
    centred = (own - known.mean()) / (known.std(correction=0) + 1e-8)
    return torch.where(mask, centred, 0).to(values.dtype)
