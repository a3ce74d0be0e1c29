"""Cutting units and inputs out of a module's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_cpna.graph import Graph
from lightning_cpna.layers import layers_of
from lightning_cpna.sparse import SparseLinear

_WIDTHS = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_parameters",
    "num_channels", "normalized_shape",
)  # fmt: skip


def all_but_one(dead: Tensor) -> Tensor:
    """Spare the first of some units or inputs, bool ``(n,)``, where all are dead."""
    dead = dead.clone()
    dead[:1] &= not bool(dead.all())
    return dead


def cut_units_(module: nn.Module, graph: Graph, name: str, dead: Tensor) -> None:
    """Cut units out of a layer, and the inputs that read them out of the layers that it feeds.

    Args:
        module: The module, changed in place: its parameters are replaced.
        graph: Its traced layers, which know everything that the layer feeds.
        name: The layer, by weight name.
        dead: Which units go, bool ``(unit,)``.
    """
    layers = layers_of(module)
    owner = layers[name]
    keep = (~dead).nonzero().flatten()
    if isinstance(owner, SparseLinear):
        owner.select_(units=keep)
    else:
        _replace(owner, "weight", 0, keep)
        set_widths(owner, len(keep), output=True)
    if owner.bias is not None:
        _replace(owner, "bias", 0, keep)
    for reader in graph.fed_by(name):
        unread = graph.at_inputs(dead[None], reader.weight, name, default=False)[0]
        cut_inputs_(layers[reader.weight], (~unread).nonzero().flatten())


def cut_inputs_(layer: nn.Module, keep: Tensor) -> None:
    """Cut all but some inputs (int64) out of a Linear, Conv or SparseLinear, in place."""
    if isinstance(layer, SparseLinear):
        layer.select_(inputs=keep)
        return
    _replace(layer, "weight", 1, keep)
    set_widths(layer, len(keep), output=False)


def width(layer: nn.Module) -> int:
    """Count the units of a Linear, Conv or SparseLinear."""
    return layer.out_features if isinstance(layer, SparseLinear) else layer.get_parameter("weight").shape[0]


def read_inputs(layer: nn.Module) -> Tensor:
    """Tell which inputs a Linear, Conv or SparseLinear reads with a weight that is not zero, bool ``(input,)``."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, SparseLinear):
        read = torch.zeros(layer.in_features, dtype=torch.bool, device=weight.device)
        read[layer.col_indices[weight != 0]] = True
        return read
    return weight.movedim(1, 0).flatten(1).any(1)


def _replace(owner: nn.Module, name: str, axis: int, keep: Tensor) -> None:
    old = owner.get_parameter(name)
    new = nn.Parameter(old.detach().index_select(axis, keep.to(old.device)), requires_grad=old.requires_grad)
    setattr(owner, name, new)


def set_widths(layer: Any, n: int, output: bool) -> None:
    """Tell a Linear or Conv how many outputs or inputs it has."""
    kind = "channels" if isinstance(layer, _ConvNd) else "features"
    setattr(layer, f"{'out' if output else 'in'}_{kind}", n)


class Groups:
    """What must be cut together in a network of any shape, by torch-pruning.

    Args:
        module: The network.
        inputs: The arguments of its forward.

    Raises:
        ImportError: If torch-pruning is not installed.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise ImportError("it needs torch-pruning: pip install 'lightning-cpna[structured]'") from error
        self._cuts = {
            nn.Linear: torch_pruning.prune_linear_out_channels,
            _ConvNd: torch_pruning.prune_conv_out_channels,
        }
        self._layers = layers_of(module)
        parameters = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        for parameter, _ in parameters:
            parameter.requires_grad_()  # it follows the gradients' graph
        with torch.enable_grad():
            self._graph = torch_pruning.DependencyGraph().build_dependency(module, inputs)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)

    def _of(self, name: str, units: list[int]) -> Any:
        owner = self._layers[name]
        if isinstance(owner, SparseLinear):
            raise TypeError("torch-pruning does not know SparseLinear")
        cut = next(cut for kind, cut in self._cuts.items() if isinstance(owner, kind))
        return self._graph.get_pruning_group(owner, cut, units)

    def dead_units(self, name: str) -> Tensor:
        """Tell which units of a layer are read by zero weights only, together with all that must be cut with them.

        Returns:
            Bool ``(unit,)``; False where nothing reads them.
        """
        n_units = width(self._layers[name])
        reads = torch.zeros(n_units, dtype=torch.int64)
        zero = torch.ones(n_units, dtype=torch.bool)
        group = self._of(name, list(range(n_units)))
        for item in group.items:
            reader, roots = item.dep.target.module, torch.tensor(item.root_idxs)
            if not self._graph.is_in_channel_pruning_fn(item.dep.handler) or not isinstance(
                reader, nn.Linear | _ConvNd
            ):
                continue
            if getattr(reader, "groups", 1) == 1:
                axis = 0 if isinstance(reader, _ConvTransposeNd) else 1
                used = reader.weight.detach().movedim(axis, 0).flatten(1).any(1).cpu()[item.idxs]
                reads.index_add_(0, roots, torch.ones_like(roots))
                zero[roots[used]] = False
            elif reader.weight.shape[1] > 1:  # of a depthwise convolution the units go with their inputs
                zero[roots] = False
        return zero & (reads > 0)

    def cut_(self, name: str, dead: Tensor) -> None:
        """Cut units and all that must go with them, in place."""
        group = self._of(name, dead.nonzero().flatten().tolist())
        if not self._graph.check_pruning_group(group):
            raise ValueError("nothing would be left of a layer that must be cut with it")
        group.prune()


def shapes_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the widths of a module's parts: attributes and tensor shapes, as what JSON can hold."""
    found: dict[str, dict[str, Any]] = {}
    for path, part in module.named_modules():
        tensors = {**part._parameters, **part._buffers}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        if shapes:
            widths = {
                name: getattr(part, name) for name in _WIDTHS if isinstance(getattr(part, name, None), int | tuple)
            }
            found[path] = {"widths": widths, "shapes": shapes}
    return found


def set_shapes_(module: nn.Module, shapes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a module's parts the widths that ``shapes_of`` described; tensors of another shape are replaced by empty ones.

    Raises:
        ValueError: If a part or a tensor is not there, or is smaller than it should be.
    """
    parts = dict(module.named_modules())
    for path, described in shapes.items():
        for name, shape in described["shapes"].items():
            if isinstance(parts.get(path), SparseLinear) and name not in ("bias", "shape"):
                continue  # it takes the file's connections, however many
            tensor = getattr(parts.get(path), name, None)
            if not isinstance(tensor, Tensor) or not _can_be(tensor, shape):
                raise ValueError(
                    f"{path}.{name} of shape {shape} is not in the module: the file belongs to another network"
                )
            if list(tensor.shape) != shape:
                empty = tensor.detach().new_empty(shape)
                new = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                setattr(parts[path], name, new)
        for name, width in described["widths"].items():
            setattr(parts[path], name, tuple(width) if isinstance(width, list) else width)


def _can_be(tensor: Tensor, shape: list[int]) -> bool:
    return tensor.ndim == len(shape) and all(n <= full for n, full in zip(shape, tensor.shape, strict=True))
