"""Networks that are really smaller: dead units and unused features are taken out of the tensors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpna.activations import Watch, evaluating, layers_of
from lightning_cpna.cost import Cost, cost_of
from lightning_cpna.graph import Graph
from lightning_cpna.replay import float64_copy, replay
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.surgery import Groups, cut_inputs_, cut_units_, set_shapes_, shapes_of
from lightning_cpna.tracing import trace

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Compacted:
    """A compact network, and what was done to make it.

    Attributes:
        module: The compact network, a copy; the module that it was made of is as it was.
        features: The input features that it reads, int64 ``(n,)``: call it with ``x[..., features]``. None: all, because all
            are used, or the input is not one table of features.
        removed: How many units went, by weight name.
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
        lines = [
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}",
            f"MACs per example {self.before.macs:,} -> {self.after.macs:,}",
            *(
                f"latency at batch {size}: {1e3 * old:.3g} -> {1e3 * self.after.latency[size]:.3g} ms "
                f"({old / self.after.latency[size]:.1f} x faster)"
                for size, old in self.before.latency.items()
            ),
            *(f"units removed of {name}: {n}" for name, n in self.removed.items()),
            *(f"left as zeros, {name}: {reason}" for name, reason in self.left.items()),
        ]
        if self.features is not None:
            lines.append(f"input features read: {len(self.features)}")
        return "\n".join(lines)


def compact(module: nn.Module, example: Tensor, *, batch_sizes: tuple[int, ...] = (1, 256)) -> Compacted:
    """Take dead units and unused input features out of a network for real.

    A unit is dead if every weight that reads it is zero, or if nothing reaches it, so that it is a constant, which goes
    into the biases of the layers that read it. Chains of Linear and Conv layers are cut here; where normalisation layers,
    residual sums or groups must be cut with them, torch-pruning does it (the extra ``structured``). After each cut the
    outputs on the example are compared in float64; what changes them by more than 1e-6 of their magnitude is undone and
    named.

    Args:
        module: The network, trained; it is left as it is.
        example: A real batch of inputs, ``(batch, ...)``.
        batch_sizes: The batch sizes at which latencies are measured.

    Returns:
        The compact network and what was done.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net[2].weight.data[:, 3:] = 0
        >>> net[0].weight.data[:, 2] = 0
        >>> compacted = compact(net, torch.randn(16, 6), batch_sizes=())
        >>> compacted.module[0].weight.shape, compacted.features.tolist()
        (torch.Size([3, 5]), [0, 1, 3, 4, 5])
    """
    original = getattr(module, "_orig_mod", module)
    modes = {name: part.training for name, part in original.named_modules()}
    with evaluating(original):
        work = _Work(copy.deepcopy(original).eval(), example)
        work.cut_units()
        features = work.cut_features()
        compacted = work.module
        small = example if features is None else example.index_select(-1, features.to(example.device))
        before, after = cost_of(original, example, batch_sizes), cost_of(compacted, small, batch_sizes)
    for name, part in compacted.named_modules():
        part.training = modes[name]
    return Compacted(compacted, features, work.removed, work.left, before, after)


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

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module, self.example = module, example
        self.removed: dict[str, int] = {}
        self.left: dict[str, str] = {}
        self._expected = _outputs(module, example)
        self._given_up: set[str] = set()

    def cut_units(self) -> None:
        """Cut until nothing is dead any more."""
        cutting = True
        while cutting:
            graph = trace(self.module, self.example)
            cutting = False
            for name in reversed(list(layers_of(self.module))):
                if (
                    name not in self._given_up
                    and not (name in graph and graph[name].is_output)
                    and self._cut(graph, name)
                ):
                    cutting = True
                    graph = trace(self.module, self.example)

    def _cut(self, graph: Graph, name: str) -> bool:
        """Cut a layer's dead units; return whether any went."""
        is_known = name in graph and graph[name].lost is None and bool(graph.fed_by(name))
        if is_known and all(reader.weight in layers_of(self.module) for reader in graph.fed_by(name)):
            self._fold_constants(graph, name)
            tensors = dict(self.module.named_parameters())
            dead = _all_but_one(graph.outgoing_norm(name, tensors)[0] == 0)
            if not dead.any():
                return False
            n_groups = getattr(layers_of(self.module)[name], "groups", 1)
            if n_groups == 1 and self._try(lambda module: cut_units_(module, graph, name, dead)) is None:
                self.removed[name] = self.removed.get(name, 0) + int(dead.sum())
                return True
        try:
            dead = _all_but_one(Groups(copy.deepcopy(self.module), self.example).dead_units(name))
        except Exception as error:  # of the network's, or of torch-pruning's, which does not know every network
            return self._give_up(name, _reason(error))
        if not dead.any():
            return False
        if (why := self._try(lambda module: Groups(module, self.example).cut_(name, dead))) is not None:
            return self._give_up(name, why)
        self.removed[name] = self.removed.get(name, 0) + int(dead.sum())
        return True

    def _give_up(self, name: str, why: str) -> bool:
        self._given_up.add(name)
        self.left[name] = why
        return False

    def _fold_constants(self, graph: Graph, name: str) -> None:
        """Put units that nothing reaches, whose activation is constant, into the biases of the layers that read them."""
        tensors = dict(self.module.named_parameters())
        constant = graph.incoming_norm(name, tensors) == 0
        constant &= graph.outgoing_norm(name, tensors) > 0  # (1, unit)
        readers = [reader.weight for reader in graph.fed_by(name)]
        if not constant.any() or any(graph[reader].bias is None for reader in readers):
            return
        with torch.no_grad(), Watch(self.module, readers) as watch:
            self.module(self.example)
        watch.digest(graph, [name])

        def fold(module: nn.Module) -> None:
            sparsity = Sparsity(module)
            sparsity.graph = graph
            sparsity.propagate_means_(name, constant, watch.means())
            for reader in readers:
                read = graph.at_inputs(constant, reader, name, default=False)[0]
                sparsity.tensors[reader].data[:, read.to(sparsity.tensors[reader].device)] = 0

        if (why := self._try(fold)) is not None:
            self.left[name] = f"constant units: {why}"

    def cut_features(self) -> Tensor | None:
        """Cut the input features that nothing reads; return those that are left, or None if all are."""
        readers: dict[str, nn.Module] = {}

        def note(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0] is self.example and isinstance(layer, nn.Linear):
                readers[name] = layer

        with contextlib.ExitStack() as context, torch.no_grad():
            for name, layer in layers_of(self.module).items():
                context.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
            self.module(self.example)
        if not readers:
            return None
        used = torch.stack([layer.get_parameter("weight").detach().any(0) for layer in readers.values()]).any(0)
        unused = _all_but_one(~used)
        keep = (~unused).nonzero().flatten()
        if not unused.any():
            return None

        def cut(module: nn.Module) -> None:
            layers = layers_of(module)
            for name in readers:
                cut_inputs_(layers[name], keep)

        why = self._try(cut, self.example.index_select(-1, keep))
        if why is not None:
            self.left |= dict.fromkeys(readers, f"unused input features: {why}")
            return None
        return keep.cpu()

    def _try(self, change: Callable[[nn.Module], None], example: Tensor | None = None) -> str | None:
        """Change the network, unless that changes its outputs or breaks it; return why not."""
        twin = copy.deepcopy(self.module)
        try:
            change(twin)
            outputs = _outputs(twin, self.example if example is None else example)
        except Exception as error:  # whatever the network's own code says to tensors of another width
            return _reason(error)
        for old, new in zip(self._expected, outputs, strict=True):
            if old.shape != new.shape:
                return f"the output would have shape {tuple(new.shape)} instead of {tuple(old.shape)}"
            scale = old.abs().max().clamp(min=torch.finfo(old.dtype).tiny)
            if not float((new - old).abs().max() / scale) <= TOLERANCE:
                return f"the output would change by {float((new - old).abs().max() / scale):.1e} of its magnitude"
        self.module = twin
        return None


def _outputs(module: nn.Module, example: Tensor) -> list[Tensor]:
    with float64_copy(module) as twin:
        return replay(twin, "", ((example,), {}))


def _all_but_one(dead: Tensor) -> Tensor:
    """Keep one, where all are dead."""
    dead = dead.clone()
    dead[:1] &= not bool(dead.all())
    return dead


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
