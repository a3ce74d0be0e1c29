"""Networks that are really smaller: dead units and unused features are taken out of the tensors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_cpna.activations import Watch
from lightning_cpna.cost import Cost, cost_of
from lightning_cpna.graph import Graph
from lightning_cpna.layers import change_input, evaluating, layers_of
from lightning_cpna.replay import float64_copy, reason, replay, why_not
from lightning_cpna.shrink import is_shrunk
from lightning_cpna.sparse import SparseLinear
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.stacked import Stacked
from lightning_cpna.surgery import (
    Groups,
    all_but_one,
    cut_inputs_,
    cut_units_,
    read_inputs,
    set_shapes_,
    shapes_of,
    width,
)
from lightning_cpna.tracing import trace

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Compacted:
    """A compact network, and what was done to make it.

    Attributes:
        module: The compact network, a copy; the module that it was made of is as it was.
        features: The features of its first input that it reads, int64 ``(n,)``: call it with ``x[..., features]``. None: all,
            because all are used, or the input is no table of features.
        removed: How many units went of each layer, by weight name.
        left: What could not be taken out and stays as zeros: why, by weight name.
        before: What the network cost.
        after: What the compact one costs.
    """

    module: nn.Module
    features: Tensor | None
    removed: Mapping[str, int]
    left: Mapping[str, str]
    before: Cost
    after: Cost

    def inputs(self, x: Tensor) -> Tensor:
        """Take from inputs of the network what the compact one reads."""
        return x if self.features is None else x.index_select(-1, self.features.to(x.device))

    def save(self, folder: str | Path) -> None:
        """Write ``state_dict.pt``, and ``widths.json`` from which ``load_compact`` rebuilds the network around it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), folder / "state_dict.pt")
        features = None if self.features is None else self.features.tolist()
        widths = {"features": features, "modules": shapes_of(self.module)}
        (folder / "widths.json").write_text(json.dumps(widths, indent=1) + "\n")

    def __str__(self) -> str:
        is_smaller = self.after.parameters < self.before.parameters
        lines = [
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}",
            f"MACs per example {self.before.macs:,} -> {self.after.macs:,}",
            *(
                f"latency at batch {size}: {1e3 * old:.3g} -> {1e3 * self.after.latency[size]:.3g} ms"
                + (f" ({old / self.after.latency[size]:.1f} times as fast)" if is_smaller else "")
                for size, old in self.before.latency.items()
            ),
            *(f"units removed of {name}: {n}" for name, n in self.removed.items()),
            *(f"left as zeros, {name}: {reason}" for name, reason in self.left.items()),
        ]
        if self.features is not None:
            lines.append(f"input features read: {len(self.features)}")
        return "\n".join(lines)


def compact(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], *, batch_sizes: tuple[int, ...] = (1, 256)
) -> Compacted:
    """Take dead units and unused input features out of a network for real.

    A unit is dead if every weight that reads it is zero, or if nothing reaches it, so that it is a constant, which goes
    into the biases of the layers that read it. Chains of Linear and Conv layers are cut here; where normalisation layers,
    residual sums or groups must be cut with them, torch-pruning does it (the extra ``structured``). After each cut the
    outputs on the example are compared in float64; what changes them by more than 1e-6 of their magnitude is undone and
    named.

    Args:
        module: The network, trained; it is left as it is.
        example: A real batch of inputs, ``(batch, ...)``; a tuple of them, if the forward takes several.
        batch_sizes: The batch sizes at which latencies are measured.

    Returns:
        The compact network and what was done.

    Raises:
        ValueError: If the example is no tensor or tuple of tensors that the module takes, or the module is being shrunk by a
            running fit.

    Examples:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net[2].weight.data[:, 3:] = 0
        >>> net[0].weight.data[:, 2] = 0
        >>> compacted = compact(net, torch.randn(16, 6), batch_sizes=())
        >>> compacted.module[0].weight.shape, compacted.features.tolist()
        (torch.Size([3, 5]), [0, 1, 3, 4, 5])
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"module is a {type(module).__name__}; allowed is the nn.Module itself, or a part that has a forward"
        )
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"example is a {type(example).__name__}; allowed is a tensor, or a tuple of tensors")
    original = getattr(module, "_orig_mod", module)
    if isinstance(original, Stacked):
        raise ValueError("module is a stack, whose members lose different units; allowed is member(stacked, i)")
    if is_shrunk(original):
        raise ValueError(
            "module is made smaller by a running fit (shrink=True); allowed is to compact it after the fit"
        )
    modes = {name: part.training for name, part in original.named_modules()}
    with evaluating(original):
        try:
            work = _Work(copy.deepcopy(original).eval(), inputs)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"example has shape {shapes}, on which the module fails, copied to float64: {reason(error)}"
            ) from error
        work.cut_units()
        work.drop_zeros()
        features = work.cut_features()
    compacted = work.module
    for name, part in compacted.named_modules():
        part.training = modes[name]
    before, after = cost_of(original, inputs, batch_sizes), cost_of(compacted, work.inputs, batch_sizes)
    widths = {name: width(layer) for name, layer in layers_of(original).items()}
    removed = {name: n for name, layer in layers_of(compacted).items() if (n := widths[name] - width(layer))}
    return Compacted(compacted, features, removed, work.left, before, after)


def load_compact(module: nn.Module, folder: str | Path) -> tuple[nn.Module, Tensor | None]:
    """Rebuild a compact network from the files that ``Compacted.save`` wrote.

    Args:
        module: The network as it was before it was compacted, from its own code; it is changed in place.
        folder: Where the files are.

    Returns:
        The module, and the input features that it reads (None: all).

    Raises:
        ValueError: If the files belong to another network.
    """
    folder = Path(folder)
    widths = json.loads((folder / "widths.json").read_text())
    set_shapes_(module, widths["modules"])
    module.load_state_dict(torch.load(folder / "state_dict.pt", weights_only=True))
    features = widths["features"]
    return module, None if features is None else torch.tensor(features)


class _Work:
    """A copy of a network from which units and features are cut."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.module, self.inputs = module, inputs
        self.left: dict[str, str] = {}
        self._expected = self._outputs(module, inputs)
        self._given_up: set[str] = set()

    def cut_units(self) -> None:
        """Cut until nothing is dead any more."""
        cutting = True
        while cutting:
            graph = self._trace()
            cutting = False
            for name in reversed(list(layers_of(self.module))):
                # What reaches the output through a call that mixes units has another obstacle than that.
                is_output = name in graph and graph[name].is_output and len(graph[name].obstacles) == 1
                if name not in self._given_up and not is_output and self._cut(graph, name):
                    cutting = True
                    graph = self._trace()

    def _trace(self) -> Graph:
        self._traced = self.module  # the graph's axes ask its layers, which must not go before it does
        return trace(self.module, *self.inputs)

    def drop_zeros(self) -> None:
        """Take weights that are zero out of sparse layers."""
        for layer in layers_of(self.module).values():
            if isinstance(layer, SparseLinear):
                layer.drop_(layer.weight.detach() == 0)

    def _cut(self, graph: Graph, name: str) -> bool:
        """Cut a layer's dead units; return whether any went."""
        if name in graph.hidden(layers_of(self.module)):
            self._fold_constants(graph, name)
            dead = all_but_one(graph.outgoing_norm(name, dict(self.module.named_parameters()))[0] == 0)
            if not dead.any():
                return False
            n_groups = getattr(layers_of(self.module)[name], "groups", 1)
            if n_groups == 1 and not self._try(lambda module: cut_units_(module, graph, name, dead)):
                return True
        try:
            dead = all_but_one(Groups(copy.deepcopy(self.module), self.inputs).dead_units(name))
            why = self._try(lambda module: Groups(module, self.inputs).cut_(name, dead)) if dead.any() else ""
        except Exception as error:  # of the network's, or of torch-pruning's, which does not know every network
            self._given_up.add(name)
            if _has_zero_inputs(self.module):
                self.left[name] = reason(error)
            return False
        if why:
            self._given_up.add(name)
            self.left[name] = why
        return not why and bool(dead.any())

    def _fold_constants(self, graph: Graph, name: str) -> None:
        """Put units that nothing reaches, whose activation is constant, into the biases of the layers that read them."""
        tensors = dict(self.module.named_parameters())
        constant = graph.incoming_norm(name, tensors) == 0
        constant &= graph.outgoing_norm(name, tensors) > 0  # (1, unit)
        readers = [reader.weight for reader in graph.fed_by(name)]
        if not constant.any():
            return
        with torch.no_grad(), Watch(self.module, readers) as watch:
            self.module(*self.inputs)
        watch.digest(graph, [name])

        def fold(module: nn.Module) -> None:
            sparsity = Sparsity(module)
            sparsity.graph = graph
            sparsity.propagate_means_(name, constant, watch.means())
            for reader in readers:
                axes, weight = sparsity.targets[reader].axes, sparsity.tensors[reader].data
                read = graph.at_inputs(constant, reader, name, default=False).to(weight.device)
                axes.view(weight).masked_fill_(axes.along_inputs(read, weight), 0)

        if why := self._try(fold):
            self.left[name] = f"constant units: {why}"

    def cut_features(self) -> Tensor | None:
        """Cut the features of the first input that nothing reads; return those that are left, or None if all are."""
        readers: dict[str, nn.Module] = {}

        def note(name: str, layer: nn.Module, x: Tensor) -> Tensor:
            if x is self.inputs[0] and isinstance(layer, nn.Linear | SparseLinear):
                readers[name] = layer
            return x

        with contextlib.ExitStack() as context, torch.no_grad():
            for name, layer in layers_of(self.module).items():
                context.callback(change_input(layer, partial(note, name, layer)).remove)
            self.module(*self.inputs)
        if not readers:
            return None
        used = torch.stack([read_inputs(layer) for layer in readers.values()]).any(0)
        unused = all_but_one(~used)
        keep = (~unused).nonzero().flatten()
        if not unused.any():
            return None

        def cut(module: nn.Module) -> None:
            layers = layers_of(module)
            for name in readers:
                cut_inputs_(layers[name], keep)

        small = (self.inputs[0].index_select(-1, keep), *self.inputs[1:])
        if why := self._try(cut, small):
            self.left |= dict.fromkeys(readers, f"unused input features: {why}")
            return None
        self.inputs = small
        return keep.cpu()

    def _try(self, change: Callable[[nn.Module], None], inputs: tuple[Tensor, ...] | None = None) -> str:
        """Change the network, unless that changes its outputs or breaks it; return why not."""
        twin = copy.deepcopy(self.module)

        def run() -> list[Tensor]:
            change(twin)
            return self._outputs(twin, inputs or self.inputs)

        why = why_not(self._expected, run, TOLERANCE)
        if not why:
            self.module = twin
        return why

    @staticmethod
    def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with float64_copy(module) as twin:
            return replay(twin, "", (inputs, {}))


def _has_zero_inputs(module: nn.Module) -> bool:
    """Tell whether any layer ignores one of its inputs, so that something may be dead."""
    return any(not bool(read_inputs(layer).all()) for layer in layers_of(module).values())
