"""Snapshots of a network, and going back to them under the masks that it has now."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_cpna.cells import cells_of, pick, put_cells_
from lightning_cpna.mask import ListMask, Mask
from lightning_cpna.masks import Masks
from lightning_cpna.moments import optimizer_of, replace_, zero_, zero_moments_
from lightning_cpna.sparse import SparseLinear
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.targets import ListedAxes, canonical_name


@dataclass(frozen=True)
class Rewind:
    """Where a network goes back to, and what of it goes.

    Attributes:
        to: ``"init"``: the beginning of training (Frankle and Carbin 2019). A number k: the k-th optimizer step (Frankle et
            al. 2020, "rewinding"). ``"keep"``: weights and buffers stay what they are, the rest goes back to the beginning
            (Renda et al. 2020, "learning rate rewinding").
        weights: Whether the parameters go back.
        buffers: Whether buffers do, as BatchNorm's running statistics.
        optimizer: Whether the optimizers' states do, as momentum.
        schedule: Whether learning rates and their schedulers do.
        sampler: Whether the random number generators do, so that batches come in the order of the first round.

    Examples:
        >>> Rewind(500, optimizer=False).label
        'step 500'
    """

    to: Literal["init", "keep"] | int = "init"
    weights: bool = True
    buffers: bool = True
    optimizer: bool = True
    schedule: bool = True
    sampler: bool = True

    def __post_init__(self) -> None:
        if self.to not in ("init", "keep") and not (type(self.to) is int and self.to >= 1):
            raise ValueError(
                f"rewind_to (or to) is {self.to!r}; allowed is 'init', 'keep', or an optimizer step (int >= 1)"
            )
        for name in ("weights", "buffers", "optimizer", "schedule", "sampler"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is True or False")

    @property
    def label(self) -> str:
        """What the branch is called in logs and figures."""
        return f"step {self.to}" if isinstance(self.to, int) else self.to


@dataclass(frozen=True)
class Snapshot:
    """A network as it was, on the CPU: tensors and Python primitives, no modules.

    Attributes:
        weights: Its parameters by canonical name.
        cells: Of each ``SparseLinear``'s weight, which connections these were, ``unit * in_features + input``, int64.
        buffers: Its buffers by canonical name.
        masks: Its masks, as ``Masks.state_dict`` returns them.
        optimizers: The optimizers' states.
        schedulers: The schedulers' states.
    """

    weights: dict[str, Tensor]
    cells: dict[str, Tensor]
    buffers: dict[str, Tensor]
    masks: dict[str, Any]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]


def take_snapshot(sparsity: Sparsity, optimizers: Iterable[Optimizer] = (), schedulers: Iterable[Any] = ()) -> Snapshot:
    """Note what a network is now.

    Args:
        sparsity: The module, in its full shapes, and its masks.
        optimizers: Its optimizers.
        schedulers: Their learning rate schedulers.

    Examples:
        >>> net = nn.Linear(3, 1)
        >>> sparsity = Sparsity(net)
        >>> snapshot = take_snapshot(sparsity)
        >>> _ = nn.init.zeros_(net.weight)
        >>> rewind_(sparsity, snapshot)
        >>> bool(net.weight.all())
        True
    """
    module = sparsity.module
    sparsity.find_targets(module)
    layers = _sparse_layers(sparsity)
    return Snapshot(
        weights={name: _to_cpu(parameter) for name, parameter in sparsity.tensors.items()},
        cells={name: _to_cpu(layer.cells) for name, layer in layers.items()},
        buffers={name: _to_cpu(buffer) for name, buffer in _buffers(module).items()},
        masks=sparsity.masks.state_dict(),
        optimizers=[tree_map(_to_cpu, optimizer.state_dict()) for optimizer in optimizers],
        schedulers=[copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers],
    )


@torch.no_grad()
def rewind_(
    sparsity: Sparsity,
    snapshot: Snapshot,
    what: Rewind | None = None,
    *,
    optimizers: Sequence[Optimizer] = (),
    schedulers: Sequence[Any] = (),
    redraw: torch.Generator | None = None,
    fill: torch.Generator | None = None,
) -> None:
    """Put a network back to what it was, in place, under the masks that it has now.

    Weights are then snapshot times mask. Connections that did not live when the snapshot was taken begin at zero, or as
    ``fill`` says.

    Args:
        sparsity: The module and its masks.
        snapshot: What it was.
        what: What goes back; None: everything.
        optimizers: Its optimizers, all that the snapshot has, or none, which then stay as they are; their states of
            connections that do not live are zero.
        schedulers: Their learning rate schedulers, likewise.
        redraw: The weights are drawn anew (Frankle and Carbin's random reinitialisation): each parameter gets values of the
            snapshot's in random order, of those that lived. That is a fresh draw from whatever distribution it was
            initialised with, as far as its entries were drawn independently. Frozen parameters are not drawn. A CPU
            generator, seeded anew for each draw.
        fill: Connections that did not live then begin with values of those that did, drawn at random. A CPU generator.

    Raises:
        ValueError: If the snapshot is one of another architecture, or of other optimizers or schedulers.
    """
    if not isinstance(what, Rewind | None):
        raise TypeError(f"what is {what!r}; allowed is a Rewind, or None")
    what = what or Rewind()
    module = sparsity.module
    sparsity.find_targets(module)
    if set(snapshot.weights) != set(sparsity.tensors):
        other = sorted(set(snapshot.weights) ^ set(sparsity.tensors))
        raise ValueError(f"snapshot: it does not have the same parameters, see {other[0]!r}: it is of another network")
    buffers = _buffers(module)
    there = {**sparsity.tensors, **buffers}
    for name, saved in {**snapshot.weights, **snapshot.buffers}.items():
        shape = tuple(there[name].shape) if name in there else None
        if name not in snapshot.cells and tuple(saved.shape) != shape:
            raise ValueError(
                f"snapshot: {name!r} has shape {shape}, in the snapshot {tuple(saved.shape)}: it is of another network, or "
                "its shape changed"
            )
    for optimizer, state in zip(optimizers, snapshot.optimizers, strict=False):
        if len(optimizer.param_groups) != len(state["param_groups"]):
            raise ValueError(
                f"optimizers: {type(optimizer).__name__} has {len(optimizer.param_groups)} parameter groups; allowed are as "
                f"many as when the snapshot was taken, {len(state['param_groups'])}"
            )
    counts = len(snapshot.optimizers), len(snapshot.schedulers)
    if (optimizers or schedulers) and (len(optimizers), len(schedulers)) != counts:
        raise ValueError(
            f"optimizers and schedulers are {len(optimizers)} and {len(schedulers)}; allowed are those of the snapshot, "
            f"{counts[0]} and {counts[1]}"
        )
    keeps = what.to == "keep"
    if what.weights and not keeps:
        masks = Masks.of(snapshot.masks)
        for name, saved in snapshot.weights.items():
            _put_back_(sparsity, name, saved, snapshot, masks.get(name), redraw, fill)
    if what.buffers and not keeps:
        for name, saved in snapshot.buffers.items():
            buffers[name].copy_(saved)
    for optimizer, state in zip(optimizers, snapshot.optimizers, strict=False):
        now = optimizer.state_dict()
        loaded = {
            "state": _states_here(sparsity, snapshot, optimizer, state) if what.optimizer else now["state"],
            "param_groups": state["param_groups"] if what.schedule else now["param_groups"],
        }
        optimizer.load_state_dict(copy.deepcopy(loaded))  # which would take the snapshot's own tensors, and train them
    if what.schedule:
        for scheduler, state in zip(schedulers, snapshot.schedulers, strict=False):
            scheduler.load_state_dict(copy.deepcopy(state))
    for name, mask in sparsity.masks.items():
        parameter = sparsity.targets[name].parameter
        owner = optimizer_of(optimizers, parameter)
        if owner is not None and not mask.all_live:
            zero_moments_(owner, parameter, cells_of(mask.dead))


@torch.no_grad()
def restore_masks_(sparsity: Sparsity, snapshot: Snapshot, optimizers: Iterable[Optimizer] = ()) -> None:
    """Put masks and patterns back to what they were; what moves in a ``SparseLinear`` is zero, with its moments.

    Args:
        sparsity: The module and its masks.
        snapshot: What it was.
        optimizers: Its optimizers.
    """
    optimizers = list(optimizers)
    for name, layer in _sparse_layers(sparsity).items():
        _move_(layer, snapshot.cells[name].to(layer.weight.device), optimizers)
    sparsity.masks.load_state_dict(snapshot.masks)
    sparsity.find_targets(sparsity.module)
    sparsity.masks.apply_(sparsity.tensors)


def _move_(layer: SparseLinear, cells: Tensor, optimizers: Iterable[Optimizer]) -> None:
    if len(cells) == len(layer.weight):  # as under DDP, which must keep its hooks on the gradient
        zero_(layer.weight, torch.arange(len(cells), device=cells.device), optimizers)
    else:
        replace_(layer.weight, lambda old: old.new_zeros(len(cells)), optimizers)
    layer.set_cells_(cells)


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _sparse_layers(sparsity: Sparsity) -> dict[str, SparseLinear]:
    return {name: target.axes.layer for name, target in sparsity.targets.items() if isinstance(target.axes, ListedAxes)}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Find the buffers by canonical name; the pattern of a ``SparseLinear`` is no state of its own."""
    return {
        canonical_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, owner in module.named_modules()
        if not isinstance(owner, SparseLinear)
        for name, buffer in owner.named_buffers(recurse=False)
    }


def _put_back_(
    sparsity: Sparsity,
    name: str,
    saved: Tensor,
    snapshot: Snapshot,
    then: Mask | None,
    redraw: torch.Generator | None,
    fill: torch.Generator | None,
) -> None:
    """Put one parameter back, or draw it anew from what it was; ``then`` is the mask that it had."""
    parameter, mask = sparsity.tensors[name], sparsity.masks.get(name)
    pool = saved.flatten() if then is None else pick(saved.flatten(), then.live.flatten())
    if redraw is not None and parameter.requires_grad:
        cells = torch.arange(parameter.numel(), device=parameter.device) if mask is None else mask.live_cells
        if len(cells) > len(pool):
            raise ValueError(
                f"redraw: {len(cells)} connections of {name!r} live, but only {len(pool)} did when the snapshot was taken; "
                "allowed are not more"
            )
        parameter.zero_()
        _draw_(parameter, cells, pool, redraw)
        return
    parameter.copy_(_found(sparsity, name, saved, snapshot))
    if mask is not None:
        mask.apply_(parameter)
    if fill is not None and mask is not None and then is not None and not isinstance(mask, ListMask):
        then.to_(parameter.device)
        _draw_(parameter, cells_of(mask.live & then.dead), pool, fill)


def _draw_(parameter: Tensor, cells: Tensor, pool: Tensor, generator: torch.Generator) -> None:
    """Put values of a pool into some cells, in random order."""
    order = torch.randperm(len(pool), generator=generator)
    put_cells_(parameter, cells, pool[order[: len(cells)]].to(parameter.device))


def _found(sparsity: Sparsity, name: str, saved: Tensor, snapshot: Snapshot) -> Tensor:
    """Return a saved tensor of a parameter's shape; of a list of connections, what those had that are there now."""
    axes = sparsity.targets[name].axes
    if name not in snapshot.cells or not isinstance(axes, ListedAxes):
        return saved
    then, now = snapshot.cells[name], axes.layer.cells.cpu()
    if not len(then):
        return saved.new_zeros(len(now))
    places = torch.searchsorted(then, now).clamp(max=len(then) - 1)
    return torch.where(then[places] == now, saved[places], 0)


def _states_here(
    sparsity: Sparsity, snapshot: Snapshot, optimizer: Optimizer, saved: Mapping[str, Any]
) -> dict[int, Any]:
    """Return an optimizer's saved states for the connections that are there now."""
    names = {id(parameter): name for name, parameter in sparsity.tensors.items()}
    owners = [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, Any] = {}
    for index, state in saved["state"].items():
        name = owners[index]
        states[index] = {
            key: _found(sparsity, name, value, snapshot)
            if isinstance(value, Tensor) and name in snapshot.cells and value.shape == snapshot.cells[name].shape
            else value
            for key, value in state.items()
        }
    return states
