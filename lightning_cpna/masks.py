"""The masks of a module: which connections of its parameters live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpna.mask import Kept, ListMask, Mask
from lightning_cpna.targets import Axes, ListedAxes, resolve

STATE_VERSION = 1


class Masks(Mapping[str, Mask]):
    """The masks of a module, by canonical parameter name.

    Zero is a legal live weight: what lives is what the mask says, never ``value != 0``.

    Examples:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> masks = Masks()
        >>> masks.add("weight", net.weight)
        >>> masks["weight"].remove_(torch.tensor([[True, False, True]]))
        2
        >>> masks.apply_(dict(net.named_parameters()))
        >>> int((net.weight != 0).sum()), masks["weight"].n_live
        (1, 1)
    """

    def __init__(self) -> None:
        self._masks: dict[str, Mask] = {}

    def __repr__(self) -> str:
        counts = (f"{name!r}: {mask.n_live:,} of {mask.dead.numel():,}" for name, mask in self.items())
        return f"Masks({', '.join(counts)})"

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, name: str, parameter: Tensor, axes: Axes | None = None) -> None:
        """Give a parameter a mask in which everything lives; one that it has already stays, on the parameter's device.

        Args:
            name: Its canonical name.
            parameter: The parameter.
            axes: Its axes; needed where it is a list of connections.

        Raises:
            ValueError: If the mask that is there has another shape than the parameter.
        """
        if name not in self._masks:
            if isinstance(axes, ListedAxes):
                self._masks[name] = ListMask.of(parameter, axes)
            else:
                dead = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
                self._masks[name] = Mask(dead, dead.clone())
        mask = self._masks[name]
        if isinstance(mask, ListMask) and isinstance(axes, ListedAxes) and mask.is_outdated(parameter, axes):
            mask = self._masks[name] = ListMask(len(parameter), mask.units, mask.inputs, mask.cells)
        if mask.dead.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.dead.shape)}, the parameter {tuple(parameter.shape)}: "
                "it belongs to another architecture"
            )
        mask.to_(parameter.device)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Masks:
        """Build the masks that ``state_dict`` describes."""
        masks = cls()
        masks.load_state_dict(state)
        return masks

    def replace(self, masks: Mapping[str, Mask]) -> None:
        """Put other masks in the place of some."""
        self._masks |= masks

    def full(self, kept: Mapping[str, Kept]) -> Masks:
        """Return the masks in the full shapes of parameters that were made smaller; what was cut is removed for good."""
        masks = Masks()
        for name, mask in self._masks.items():
            if name in kept and isinstance(mask, ListMask):
                mask = mask.full(kept[name])
            elif name in kept:
                mask = Mask(kept[name].expand(mask.dead, True), kept[name].expand(mask.removed, True))
            masks._masks[name] = mask
        return masks

    def apply_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set every connection that is not live to zero, in place."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                mask.apply_(parameters[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the masks as packed CPU tensors and Python primitives; ``torch.load(weights_only=True)`` reads them."""
        return {
            "version": STATE_VERSION,
            "masks": {name: mask.state_dict() for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the masks by those of ``state_dict``.

        Raises:
            ValueError: If the state is of a version that this release does not know; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"masks: the state has version {state.get('version')!r}; this release reads {STATE_VERSION}"
            )
        self._masks = {name: Mask.from_state_dict(entry) for name, entry in state["masks"].items()}


def infer_masks(module: nn.Module, patterns: list[str]) -> Masks:
    """Read masks off the zeros of a module, for instance one loaded from a file that holds weights only.

    Exact where no live weight is zero, as with pruning; a weight regrown at zero and not yet trained counts as removed.

    Args:
        module: The module with zeros in its weights.
        patterns: Which parameters, as in ``targets.resolve``.

    Examples:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 1.0)
        >>> net.weight.data[0, 1] = 0
        >>> infer_masks(net, ["weight"])["weight"].live
        tensor([[ True, False,  True]])
    """
    masks = Masks()
    for targets in resolve(module, patterns).values():
        for target in targets:
            masks.add(target.name, target.parameter, target.axes)
            if not isinstance(target.axes, ListedAxes):  # which says itself what lives
                masks[target.name].remove_(target.parameter.detach() == 0)
    return masks
