"""Fingerprints of what a run reads besides its checkpoint: tokenizer, prepared data, other models.

`state.json` stores them. A resumed run whose tokenizer, data, reference or reward models have other
fingerprints would continue with other meanings of the same ids and numbers, so it is refused.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.data.prepare.prepared import PreparedData


def data_fingerprint(prepared: PreparedData) -> str:
    """Return the SHA-256 of all shards of prepared data, by the hashes in their manifests."""
    digest = hashlib.sha256()
    for path in sorted(prepared.folder.rglob("shards.json")):
        digest.update(str(path.relative_to(prepared.folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@torch.no_grad()
def model_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of a module, by name."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_fingerprints(
    found: Path, saved: Mapping[str, str], present: Mapping[str, str], *, accept_changes: bool
) -> bool:
    """Return whether something has changed since the checkpoint `found` was written.

    Raise UserError that names it, unless `accept_changes`. A changed tokenizer is never accepted.
    """
    changed = [name for name in saved if name in present and saved[name] != present[name]]
    if changed and (not accept_changes or "tokenizer" in changed):
        raise UserError(
            f"{found}: the {changed[0]} of this run has changed since then; restore its source, or "
            "add --accept-changes to go on with the present data and models (the tokenizer stays "
            "that of the checkpoint)"
        )
    return bool(changed)
