"""Which tensors? Name patterns to parameters, and which axis of a weight is what."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from lightning_cpna.cells import divided

if TYPE_CHECKING:
    from lightning_cpna.sparse import SparseLinear

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Axes:
    """Which axis of a weight holds its units, which its inputs and which (if any) the members of a stacked network.

    In a grouped convolution each group of units reads inputs of its own, so the input axis is that much shorter.

    The defaults fit ``Linear``, ``Conv`` and recurrent weights. A module with another layout says so in a class
    attribute ``parameter_axes``, a dict from the parameter's local name to its ``Axes``.

    Examples:
        >>> import torch
        >>> stacked = torch.zeros(7, 3, 5)  # seven copies of a 3-in, 5-out layer, stored (member, in, out)
        >>> Axes(unit=2, input=1, member=0).view(stacked).shape
        torch.Size([7, 5, 3])
    """

    unit: int = 0
    input: int | None = 1
    member: int | None = None
    groups: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """View a weight as ``(member, unit, input, *kernel)``; a missing axis has size 1. Writing to it writes through."""
        order = [axis for axis in (self.member, self.unit, self.input) if axis is not None]
        if order != sorted(order) or order[-1] != len(order) - 1:
            tensor = tensor.movedim(order, tuple(range(len(order))))
        if self.member is None:
            tensor = tensor.unsqueeze(0)
        return tensor.unsqueeze(2) if self.input is None else tensor

    def n_members(self, tensor: Tensor) -> int:
        """Count the members of a stacked network that a weight has, 1 if it is no stack."""
        return 1 if self.member is None else tensor.shape[self.member]

    def n_units(self, tensor: Tensor) -> int:
        """Count the units of one member of a weight."""
        return self.view(tensor).shape[1]

    def n_inputs(self, tensor: Tensor) -> int:
        """Count the inputs of one member of a weight."""
        return self.view(tensor).shape[2]

    def size(self, tensor: Tensor) -> int:
        """Count the connections that a weight has or could have, of all members."""
        return tensor.numel()

    def sum_of_units(self, tensor: Tensor) -> Tensor:
        """Sum over the connections of each unit, ``(member, unit)``."""
        return self.view(tensor).flatten(2).sum(2)

    def sum_of_inputs(self, tensor: Tensor) -> Tensor:
        """Sum over the connections of each input, ``(member, input)``."""
        view = self.view(tensor)
        return view.sum([1, *range(3, view.ndim)])

    def live_features(self, live: Tensor) -> Tensor:
        """Tell which inputs have a live connection, bool ``(member, group, input)``."""
        groups = torch.stack(self.view(live).chunk(self.groups, dim=1), dim=1)  # (member, group, unit, input, *kernel)
        return groups.movedim(3, 2).flatten(3).any(3)

    def norm_of_units(self, tensor: Tensor) -> Tensor:
        """Return the norm of each unit's weights, ``(member, unit)``."""
        norms: Tensor = torch.linalg.vector_norm(self.view(tensor).flatten(2), dim=2)
        return norms

    def along_units(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Lay values of the units, ``(member, unit)``, along a weight's connections: they broadcast to its ``view``."""
        return self._along(values, 1, tensor)

    def along_inputs(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Lay values of the inputs, ``(member, input)``, along a weight's connections: they broadcast to its ``view``."""
        return self._along(values, 2, tensor)

    def _along(self, values: Tensor, axis: int, tensor: Tensor) -> Tensor:
        shape = [1] * (tensor.ndim + (self.member is None) + (self.input is None))
        shape[0], shape[axis] = values.shape
        return values.view(shape)

    def units_of(self, cells: Tensor, tensor: Tensor) -> Tensor:
        """Return the unit of some cells of a flattened ``(unit, input, *kernel)``."""
        return divided(cells, math.prod(tensor.shape[1:]))

    def inputs_of(self, cells: Tensor, tensor: Tensor) -> Tensor:
        """Return the input of some cells of a flattened ``(unit, input, *kernel)``."""
        pairs = divided(cells, math.prod(tensor.shape[2:]))  # of a unit and an input
        return pairs - tensor.shape[1] * divided(pairs, tensor.shape[1])

    def view_bias(self, bias: Tensor) -> Tensor:
        """View the bias of a weight with these axes as ``(member, unit)``; writing to it writes through."""
        if self.member is None:
            return bias.unsqueeze(0)
        return bias.movedim(0 if self.member < self.unit else -1, 0).flatten(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ListedAxes(Axes):
    """The axes of a weight that is a list of connections, ``(connection,)``, which is its own ``view``.

    Attributes:
        find: Returns the layer, which knows the unit and the input of each; it is not kept alive.
    """

    find: Callable[[], SparseLinear | None]

    @property
    def layer(self) -> SparseLinear:
        """The layer."""
        layer = self.find()
        assert layer is not None
        return layer

    def view(self, tensor: Tensor) -> Tensor:
        """Return the list."""
        return tensor

    def spread(self, units: Tensor, inputs: Tensor, shape: torch.Size) -> ListedAxes:
        """Return the axes of the layer of which only some units and inputs are left."""
        full: Any = SimpleNamespace(
            out_features=shape[0],
            in_features=shape[1],
            units=units.to(self.layer.units)[self.layer.units],
            col_indices=inputs.to(self.layer.col_indices)[self.layer.col_indices],
        )
        return ListedAxes(find=lambda: full)

    def n_units(self, tensor: Tensor) -> int:
        """See the base."""
        return self.layer.out_features

    def n_inputs(self, tensor: Tensor) -> int:
        """See the base."""
        return self.layer.in_features

    def size(self, tensor: Tensor) -> int:
        """See the base."""
        return self.layer.out_features * self.layer.in_features

    def sum_of_units(self, tensor: Tensor) -> Tensor:
        """See the base."""
        return _sum_at(self.layer.units, tensor, self.layer.out_features)

    def sum_of_inputs(self, tensor: Tensor) -> Tensor:
        """See the base."""
        return _sum_at(self.layer.col_indices, tensor, self.layer.in_features)

    def live_features(self, live: Tensor) -> Tensor:
        """See the base."""
        return self.sum_of_inputs(live)[None] > 0

    def norm_of_units(self, tensor: Tensor) -> Tensor:
        """See the base."""
        return self.sum_of_units(tensor.square()).sqrt()

    def along_units(self, values: Tensor, tensor: Tensor) -> Tensor:
        """See the base."""
        return values[0].index_select(0, self.layer.units)

    def along_inputs(self, values: Tensor, tensor: Tensor) -> Tensor:
        """See the base."""
        return values[0].index_select(0, self.layer.col_indices)

    def units_of(self, cells: Tensor, tensor: Tensor) -> Tensor:
        """Return the unit of some places of the list."""
        return self.layer.units[cells]

    def inputs_of(self, cells: Tensor, tensor: Tensor) -> Tensor:
        """Return the input of some places of the list."""
        return self.layer.col_indices[cells]


def _sum_at(places: Tensor, values: Tensor, n: int) -> Tensor:
    """Sum a list's values at their places, ``(1, n)``; bools are counted."""
    values = values.long() if values.dtype == torch.bool else values
    return values.new_zeros(1, n).index_add_(1, places, values[None])


@dataclass(frozen=True)
class Target:
    """A parameter that masks act on."""

    name: str
    parameter: nn.Parameter
    axes: Axes


def canonical_name(name: str) -> str:
    """Strip what wrappers (``torch.compile``, activation checkpointing) put into a parameter's name.

    Examples:
        >>> canonical_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def axes_of(module: nn.Module, local_name: str) -> Axes:
    """Return the axes of a module's own parameter: what the module declares, else what its type says."""
    declared: Mapping[str, Axes] = getattr(module, "parameter_axes", {})
    if local_name in declared:
        return declared[local_name]
    parameter = getattr(module, local_name)
    if parameter.ndim < 2:
        return Axes(unit=0, input=None)
    if isinstance(module, _ConvTransposeNd):
        return Axes(unit=1, input=0)
    return Axes(groups=module.groups) if isinstance(module, _ConvNd) and local_name == "weight" else Axes()


def all_targets(module: nn.Module) -> dict[str, Target]:
    """List every parameter of a module by canonical name, in the module's order; a shared parameter appears once.

    Examples:
        >>> list(all_targets(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))))
        ['0.weight', '0.bias', '2.weight']
    """
    found: dict[str, Target] = {}
    seen: set[int] = set()
    for module_name, owner in module.named_modules():
        for local_name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = canonical_name(f"{module_name}.{local_name}" if module_name else local_name)
                axes = Axes() if isinstance(parameter, UninitializedParameter) else axes_of(owner, local_name)
                found[name] = Target(name, parameter, axes)
    return found


def resolve(module: nn.Module, patterns: Iterable[str]) -> dict[str, list[Target]]:
    """Find the parameters that each pattern names.

    Args:
        module: The module whose parameters are searched.
        patterns: Exact parameter names or shell globs (``"net.*.weight"``), matched against canonical names.

    Returns:
        For each pattern its targets, in the module's order.

    Raises:
        ValueError: If a pattern matches nothing, two patterns match one parameter, or a parameter of a lazy module
            has no shape yet.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [target.name for target in resolve(net, ["*.weight"])["*.weight"]]
        ['0.weight', '2.weight']
    """
    available = all_targets(module)
    owner: dict[str, str] = {}
    resolved: dict[str, list[Target]] = {}
    for pattern in patterns:
        names = [name for name in available if name == pattern or fnmatchcase(name, pattern)]
        if not names:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if canonical_name(name) == pattern:
                    tied = next(other for other, target in available.items() if target.parameter is parameter)
                    raise ValueError(f"targets: {pattern!r} is tied to {tied!r}; use that name")
            inside = [name for name in available if name.startswith(f"{pattern}.")]
            close = inside or difflib.get_close_matches(pattern, available, n=3, cutoff=0.5)
            hint = (
                f"did you mean {', '.join(close)}?"
                if close
                else f"there are {', '.join(list(available)[:10]) or 'none'}"
            )
            raise ValueError(f"targets: {pattern!r} matches no parameter; {hint}")
        for name in names:
            if name in owner:
                raise ValueError(
                    f"targets: {name!r} is matched by both {owner[name]!r} and {pattern!r}; one pattern may own it"
                )
            if isinstance(available[name].parameter, UninitializedParameter):
                raise ValueError(f"targets: {name!r} has no shape yet; run a batch through the lazy module before fit")
            owner[name] = pattern
        resolved[pattern] = [available[name] for name in names]
    return resolved


def n_keep(wanted: int | float, n: int, name: str) -> int:
    """Turn what the user wants to remain into a count: an int is the count, a float in (0, 1) the fraction kept.

    Args:
        wanted: The count or the density.
        n: How many there are.
        name: What is counted, for the error.

    Raises:
        ValueError: If fewer than one or more than ``n`` should remain.

    Examples:
        >>> n_keep(0.25, 10, "net.0.weight"), n_keep(7, 10, "net.0.weight"), n_keep(0.001, 10, "net.0.weight")
        (3, 7, 1)
    """
    if isinstance(wanted, float):
        if not 0.0 < wanted < 1.0:
            raise ValueError(f"targets: the density of {name!r} is {wanted}; allowed is a float in (0, 1) or a count")
        return max(1, int(wanted * n + 0.5))
    if not 1 <= wanted <= n:
        raise ValueError(f"targets: {wanted} should remain of {name!r}, which has {n}; allowed is 1 to {n}")
    return wanted
