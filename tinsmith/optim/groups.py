"""Partition parameters into optimizer groups: every trainable parameter has exactly one role.

- `matrix`: weights of linear layers, and stacks of experts (E, rows, columns), which their module
  lists in `EXPERT_STACKS`; trained by `optim.matrices` (Muon). All other roles are trained by
  `optim.others` (AdamW).
- `embedding`: token and position tables; a tied head is the embedding; 2-D parameters outside of
  linear layers, such as mixing matrices.
- `head`: a separate output layer, which is a linear layer named `head`.
- `router`: weights that score experts or branches; each row belongs to one of them.
- `vector`: norms, biases, sinks, scalars, matrices with one row or column, convolution kernels, and
  the mixing weights of residual streams (`hyper`, `mhyper`), where weight decay would pull the
  identity towards zero. Never decays.

Orthogonalised updates are meant for matrices that map vectors to vectors, not for tables, mixing
matrices or routers, even if these are 2-D. Therefore the module determines the role, not a pattern
of names.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

from torch import nn

Role = Literal["matrix", "embedding", "head", "router", "vector"]
ROLES: tuple[Role, ...] = get_args(Role)
Partition = dict[Role, list[tuple[str, nn.Parameter]]]


@runtime_checkable
class HasRole(Protocol):
    """A module class with a `ROLE`, which applies to all its parameters.

    It also applies to inner modules that declare none. Parameters with fewer than two dimensions
    are always vectors.
    """

    ROLE: ClassVar[Role]


def partition(module: nn.Module) -> Partition:
    """Return role -> [(name, parameter)] of all trainable parameters in `module`, shared ones once.

    Names and order are those of `named_parameters()`. Raises ValueError if two owners of a shared
    parameter give it different roles (embedding and head give embedding).
    """
    roles: dict[nn.Parameter, set[Role]] = {}
    for parameter, role in _roles_by_owner(module, "", None):
        roles.setdefault(parameter, set()).add(role)
    groups: Partition = {role: [] for role in ROLES}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[_common_role(name, roles[parameter])].append((name, parameter))
    trainable = {parameter for parameter in module.parameters() if parameter.requires_grad}
    grouped = [parameter for group in groups.values() for _, parameter in group]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable)), "not a partition"
    return groups


def _roles_by_owner(
    module: nn.Module, name: str, inherited: Role | None
) -> Iterator[tuple[nn.Parameter, Role]]:
    declared = _declared_role(module) or inherited
    for key, parameter in module.named_parameters(recurse=False):
        yield parameter, _role(module, name, key, parameter, declared)
    for child, inner in module.named_children():
        yield from _roles_by_owner(inner, child, declared)


def _declared_role(module: nn.Module) -> Role | None:
    return module.ROLE if isinstance(module, HasRole) else None


def _role(
    owner: nn.Module, name: str, key: str, parameter: nn.Parameter, declared: Role | None
) -> Role:
    if parameter.dim() < 2 or min(parameter.shape[-2:]) == 1:
        return "vector"
    if declared is not None:
        return declared
    if isinstance(owner, nn.Linear):
        return "head" if name == "head" else "matrix"
    if key in getattr(owner, "EXPERT_STACKS", ()):
        return "matrix"
    return "embedding" if parameter.dim() == 2 else "vector"


def _common_role(name: str, roles: set[Role]) -> Role:
    if roles == {"embedding", "head"}:
        return "embedding"
    if len(roles) > 1:
        raise ValueError(
            f"{name} is shared by modules that give it different roles: {', '.join(sorted(roles))}"
        )
    return next(iter(roles))
