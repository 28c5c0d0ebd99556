"""Which optimizer a parameter belongs to: every trainable parameter has exactly one role.

- `matrix`: weights of linear layers, and stacks of experts (E, rows, columns), which their module
  lists in `EXPERT_STACKS`; trained by `optim.matrices` (Muon). All other roles are trained by
  `optim.others` (AdamW).
- `embedding`: token and position tables; a tied head is the embedding; bare 2-D parameters that no
  linear layer owns, such as mixing matrices.
- `head`: an output layer of its own, which is a linear layer named `head`.
- `router`: what scores experts or branches; each of its rows has a meaning.
- `vector`: norms, biases, sinks, scalars, matrices with a side of 1, convolution kernels, and all
  that mixes residual streams (`hyper`, `mhyper`), where weight decay would pull the identity
  towards zero. Never decays.

Orthogonalised updates are for matrices that map vectors to vectors; a table, a mixing matrix or a
router is another thing even where it is 2-D. So the module tells the role, no pattern of names.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

from torch import nn

Role = Literal["matrix", "embedding", "head", "router", "vector"]
ROLES: tuple[Role, ...] = get_args(Role)
Partition = dict[Role, list[tuple[str, nn.Parameter]]]


@runtime_checkable
class HasRole(Protocol):
    """A module class with `ROLE = "router"` (or another role) gives it to all its parameters, and
    to those of modules inside that declare none. What has fewer than two dimensions stays a vector.
    """

    ROLE: ClassVar[Role]


def partition(module: nn.Module) -> Partition:
    """Role -> [(name, parameter)] of all in `module` that requires a gradient, shared ones once.

    Names and order are those of `named_parameters()`. Raises ValueError where two owners of a
    shared parameter disagree about its role (embedding and head agree: embedding).
    """
    claims: dict[nn.Parameter, set[Role]] = {}
    for parameter, role in _claims(module, "", None):
        claims.setdefault(parameter, set()).add(role)
    groups: Partition = {role: [] for role in ROLES}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[_agreed(name, claims[parameter])].append((name, parameter))
    trainable = {parameter for parameter in module.parameters() if parameter.requires_grad}
    grouped = [parameter for group in groups.values() for _, parameter in group]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable)), "not a partition"
    return groups


def _claims(
    module: nn.Module, name: str, inherited: Role | None
) -> Iterator[tuple[nn.Parameter, Role]]:
    declared = _declared(module) or inherited
    for key, parameter in module.named_parameters(recurse=False):
        yield parameter, _role(module, name, key, parameter, declared)
    for child, inner in module.named_children():
        yield from _claims(inner, child, declared)


def _declared(module: nn.Module) -> Role | None:
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


def _agreed(name: str, claims: set[Role]) -> Role:
    if claims == {"embedding", "head"}:
        return "embedding"
    if len(claims) > 1:
        raise ValueError(
            f"{name} is shared by modules that give it different roles: {', '.join(sorted(claims))}"
        )
    return next(iter(claims))
