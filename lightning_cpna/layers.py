"""The Linear, Conv and SparseLinear modules of a network, and what they read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from lightning_cpna.sparse import SparseLinear
from lightning_cpna.targets import all_targets


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Find the Linear, Conv (not transposed) and SparseLinear modules, by the canonical names of their weights.

    Those of a stack's members, which run together, are not among them.
    """
    names = {id(target.parameter): name for name, target in all_targets(module).items() if target.axes.member is None}
    return {
        names[id(part.weight)]: part
        for part in module.modules()
        if isinstance(part, nn.Linear | _ConvNd | SparseLinear)
        and not isinstance(part, _ConvTransposeNd)
        and id(part.weight) in names
    }


def change_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a Linear or Conv read something else than it is called with, until the handle is removed."""
    return layer.register_forward_pre_hook(ChangedInput(change), with_kwargs=True)


class ChangedInput:
    """A forward pre-hook that changes a layer's input; it is copied and pickled as its function is."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Change the input, however it was passed."""
        if args:
            return (self.change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self.change(kwargs["input"])}


def n_kernel_axes(reader: nn.Module) -> int:
    """Return how many axes follow that of the inputs in what a Linear or Conv module reads."""
    return 0 if isinstance(reader, SparseLinear) else reader.get_parameter("weight").ndim - 2


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and afterwards every part of it back into its own."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
