"""Tracing: which layers ran on a real batch, and what lay between them.

The network is run once on a float64 copy, with every torch call observed. Beside each activation travels a tensor of
labels, one for each element: the unit that it belongs to. Reshaping an activation reshapes its labels, so when an
activation reaches the next layer its labels say which unit feeds which column, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cpna.graph import Graph, Layer, owned
from lightning_cpna.replay import Call, Calls, float64_copy, plain, widen
from lightning_cpna.targets import all_targets, canonical_name

_LAYERS = {"linear": None, "sparse_linear": None, "conv1d": 1, "conv2d": 2, "conv3d": 3}
# f(c * x) = c * f(x) for c > 0, element by element (dropout is the identity in eval mode).
_HOMOGENEOUS = {
    "relu", "leaky_relu", "prelu", "dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d",
    "clone", "contiguous", "detach", "to", "float", "double", "type_as", "abs", "requires_grad",
}  # fmt: skip
_POOLING = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
_RESHAPING = {
    "flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "swapaxes",
    "t", "getitem", "chunk", "split", "cat", "concat", "concatenate", "stack", "expand",
    "index_select",
}  # fmt: skip
_SCALING = {"mul", "div", "truediv", "rmul", "imul", "itruediv", "multiply", "divide"}
# Element by element, so units stay apart, but scaling the input does not scale the output.
_ELEMENTWISE = {
    "gelu", "silu", "elu", "celu", "selu", "mish", "sigmoid", "tanh", "softplus", "softsign", "hardtanh", "relu6",
    "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "threshold", "rrelu", "clamp", "exp", "log", "log1p", "sin",
    "cos", "sqrt", "square", "pow", "batch_norm", "instance_norm", "hardshrink", "softshrink", "add", "iadd", "radd",
    "sub", "isub", "rsub", *_SCALING,
}  # fmt: skip
_REDUCING = {"mean", "sum", "amax", "amin"}


def trace(module: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """Trace a module on example inputs.

    Args:
        module: The module; it is left as it is.
        *args: The positional arguments of its forward, a real batch.
        **kwargs: Its keyword arguments.

    Returns:
        The graph of its layers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = trace(net, torch.zeros(5, 3))
        >>> graph["2.weight"].sources, graph["0.weight"].obstacles
        (tensor([0, 1, 2, 3]), [])
    """
    return trace_calls(module, [("", (args, kwargs))])


def trace_calls(module: nn.Module, calls: Calls) -> Graph:
    """Trace calls of submodules that together make up a network.

    A float argument that requires a gradient was computed by another call, so it is not known what feeds its reader.
    """
    with float64_copy(module) as twin:
        builder = _Builder(twin)
        for prefix, call in calls:
            path = canonical_name(prefix)
            builder.run(twin.get_submodule(path), path, call)
    return builder.graph().with_axes({name: target.axes for name, target in all_targets(module).items()})


@dataclass(frozen=True)
class _Flow:
    """What is known of an activation: the unit of each element (or None, once mixed) and the layers it stems from."""

    labels: Tensor | None
    layers: frozenset[str]
    mixed_by: str = ""


class _Builder(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(target.parameter): (name, target.axes) for name, target in all_targets(module).items()}
        self._layers: dict[str, Layer] = {}
        self._n_units = 0
        self._obstacles: dict[str, list[str]] = {}
        self._lost: dict[str, str] = {}
        self._outputs: dict[str, set[str]] = {}  # the calls whose outputs a layer's units reach
        self._split: list[tuple[str, str]] = []  # calls that are fed by others, and why it is not known by which

    def run(self, region: nn.Module, prefix: str, call: Call) -> None:
        """Run a module under observation."""
        args, kwargs = widen(call)
        self._flows: dict[int, _Flow] = {}
        self._alive: list[Any] = []  # keeps every tensor, so that no id is used twice
        self._stack: list[str] = []
        self._seen: set[str] = set()  # the layers of this call
        for name, child in region.named_modules():
            title = f"{type(child).__name__} {'.'.join(filter(None, (prefix, name)))!r}"
            child.register_forward_pre_hook(lambda *_, title=title: self._stack.append(title))
            child.register_forward_hook(lambda *_: self._stack.pop() and None)
        for given, wide in zip(tree_leaves(call), tree_leaves((args, kwargs)), strict=True):
            if isinstance(given, Tensor) and given.requires_grad:
                reason = f"{prefix!r} is called by itself, with what another call computed: put both into one forward"
                self._flows[id(wide)] = _Flow(None, frozenset(), reason)
                self._split.append((prefix, reason))
                self._alive.append(wide)
        with self:
            output = region(*args, **kwargs)
        for leaf in tree_leaves(plain(output)):
            if (flow := self._flows.get(id(leaf))) is not None:
                for layer in flow.layers:
                    self._outputs.setdefault(layer, set()).add(prefix)

    def graph(self) -> Graph:
        """Return what was seen."""
        for fed, reason in self._split:
            self._lose([name for name, calls in self._outputs.items() if calls != {fed}], reason)
        for name, layer in self._layers.items():
            unread = not any(owned(other.sources, layer).any() for other in self._layers.values())
            layer.is_output = name in self._outputs or (unread and name not in self._lost)
            layer.lost = self._lost.get(name)
            layer.obstacles = self._obstacles.get(name, [])
            if layer.is_output:
                layer.obstacles = [*layer.obstacles, f"the units of {name!r} are an output of the network"]
        return Graph(list(self._layers.values()))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = [self._flows[id(x)] for x in tensors if id(x) in self._flows]
        name = func.__name__.strip("_")
        results = [x for x in tree_leaves(plain(args[0] if name == "setitem" else out)) if isinstance(x, Tensor)]
        self._alive += [*tensors, *results]
        if name in _LAYERS and self._is_layer(args, kwargs):
            self._flows[id(out)] = self._layer(name, out, *args, **kwargs)
        elif results and (inputs or name in _LAYERS or self._is_opaque(name, tensors)):
            flows = self._passed(func, name, inputs, results, args, kwargs)
            self._flows.update(zip(map(id, results), flows, strict=True))
        return out

    def _is_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return id(weight) in self._names and (bias is None or id(bias) in self._names)

    def _is_opaque(self, name: str, tensors: list[Tensor]) -> bool:
        """Tell whether a call of the network's input holds weights that are no layer of ours: recurrent, attention."""
        weights = any(id(x) in self._names and x.ndim > 1 for x in tensors)
        return weights and name not in {
            "embedding",
            "embedding_bag",
            *_ELEMENTWISE,
            *_RESHAPING,
            *_HOMOGENEOUS,
        }

    def _layer(
        self,
        kind: str,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> _Flow:
        name, axes = self._names[id(weight)]
        dimension = -1 if kind == "linear" else -1 - int(_LAYERS[kind] or 0)
        flow = self._flows.get(id(input))
        groups = options.get("groups", rest[3] if len(rest) > 3 else 1)
        earlier = self._layers.get(name)
        n_units = out.shape[dimension]
        if earlier is not None:
            units = earlier.units
        else:
            units = range(self._n_units, self._n_units + n_units)
            self._n_units += n_units
        sources, unknown = torch.full((axes.n_inputs(weight),), -1), None
        if flow is not None:
            known = self._sources(flow, dimension) if groups == 1 else None
            if known is not None:
                sources = known
            else:
                shared = f"units of {', '.join(sorted(flow.layers))} share inputs of {name!r}"
                unknown = flow.mixed_by or (shared if groups == 1 else f"{self._where()} is grouped")
                self._block(flow.layers, unknown)
                self._lose(flow.layers, unknown)
        bias_name = None if bias is None else self._names[id(bias)][0]
        if earlier is not None:
            differs = not torch.equal(sources, earlier.sources)
            if differs or bias_name != earlier.bias or name in self._seen:
                reason = f"{name!r} is used more than once"
                feeding = [other for other, layer in self._layers.items() if owned(earlier.sources, layer).any()]
                self._block([name, *feeding, *(flow.layers if flow else ())], reason)
                self._lose([name, *feeding, *(flow.layers if flow else ())], reason)
                unknown = reason if differs else unknown
            sources, unknown = torch.full_like(sources, -1) if differs else sources, unknown or earlier.unknown_source
        self._seen.add(name)
        self._layers[name] = Layer(name, bias_name, axes, units, sources, unknown)
        shape = [1] * out.ndim
        shape[dimension] = n_units
        labels = torch.arange(units.start, units.stop, device=out.device).view(shape).expand(out.shape)
        return _Flow(labels, frozenset([name]))

    def _sources(self, flow: _Flow, dimension: int) -> Tensor | None:
        """Return which unit feeds each input of a layer, or None if that is not one unit each."""
        if flow.labels is None:
            return None
        rows = flow.labels.movedim(dimension, 0)[..., None].flatten(1)  # (input, element)
        return rows[:, 0].clone().cpu() if bool((rows == rows[:, :1]).all()) else None

    def _lose(self, layers: Iterable[str], reason: str) -> None:
        for layer in layers:
            self._lost.setdefault(layer, reason)

    def _block(self, layers: Iterable[str], reason: str) -> None:
        for layer in layers:
            reasons = self._obstacles.setdefault(layer, [])
            if reason not in reasons:
                reasons.append(reason)

    def _where(self) -> str:
        return self._stack[-1] if self._stack else "the forward"

    def _passed(
        self,
        func: Callable[..., Any],
        name: str,
        inputs: list[_Flow],
        results: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[_Flow]:
        """Return what is known of the results of a call that is no layer."""
        layers = frozenset[str]().union(*(flow.layers for flow in inputs))
        labels: list[Tensor] | None = None
        first = inputs[0].labels if len(inputs) == 1 else None
        if first is not None and name in _HOMOGENEOUS:
            labels = [first]
        elif name in _RESHAPING and all(flow.labels is not None for flow in inputs):
            labels = self._relabel(func, args, kwargs)
        elif first is not None and name in _POOLING:
            cells = first.flatten(-int(name[-2]))  # (*, cell)
            if bool((cells == cells[..., :1]).all()):
                corner = cells[..., 0]
                labels = [corner.view(*corner.shape, *[1] * int(name[-2])).expand(result.shape) for result in results]
        elif first is not None and name in _REDUCING:
            low = first.amin(*_axes_of_reduction(args, kwargs))
            high = first.amax(*_axes_of_reduction(args, kwargs))
            labels = [low] if torch.equal(low, high) else None
        elif first is not None and name in _SCALING and isinstance(args[-1], int | float) and args[-1] > 0:
            labels = [first]
        elif first is not None and name in _ELEMENTWISE and results[0].shape == first.shape:
            self._block(layers, f"{self._where()} ({name}) does not scale with its input")
            labels = [first]
        if labels is not None and len(labels) == len(results):
            return [_Flow(label, layers) for label in labels]
        mixed = [flow.mixed_by for flow in inputs if flow.mixed_by]
        reason = mixed[0] if mixed else f"{self._where()} ({name}) mixes units"
        self._block(layers, reason)
        return [_Flow(None, layers, reason)] * len(results)

    def _relabel(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        def label(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point():
                flow = self._flows.get(id(x))
                known = torch.full(x.shape, -1, device=x.device) if flow is None or flow.labels is None else flow.labels
                return known.contiguous()  # so that every view of x is one of its labels
            return x

        return [
            x
            for x in tree_leaves(plain(func(*tree_map(label, args), **tree_map(label, kwargs))))
            if isinstance(x, Tensor)
        ]


def _axes_of_reduction(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (
        kwargs.get("dim", args[1] if len(args) > 1 else ()),
        kwargs.get("keepdim", args[2] if len(args) > 2 else False),
    )
