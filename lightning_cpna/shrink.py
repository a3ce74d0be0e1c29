"""Shrinking while training: dead units and features leave the tensors; parameters and files stay what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_cpna.cells import renumbered
from lightning_cpna.graph import Graph
from lightning_cpna.layers import change_input, layers_of, n_kernel_axes
from lightning_cpna.mask import Kept, ListMask, Mask
from lightning_cpna.moments import is_elementwise, replace_, set_tensor_
from lightning_cpna.pattern import starts
from lightning_cpna.replay import float64_copy, replay, why_not
from lightning_cpna.report import may_feed
from lightning_cpna.sparse import SparseLinear, spread
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.surgery import all_but_one, set_widths

TOLERANCE = 1e-9


class Shrinking:
    """Cuts what is dead out of a module while it trains, and puts everything back in the end.

    Parameters and optimizers stay the objects that they are; only the tensors in them become smaller. The ``state_dict`` of
    the module and of the optimizers have the full shapes all the time, with zeros where something was cut.

    Args:
        module: The module.
        sparsity: What is known of it, with the graph and the calls on which each cut is checked; its masks and its graph are
            those of the small tensors while it is shrunk.
        optimizers: The optimizers.

    Raises:
        ValueError: If parameters are shared, or an optimizer is not known to work element by element.

    Examples:
        >>> from lightning_cpna import Score, trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sparsity, optimizer = Sparsity(net), torch.optim.Adam(net.parameters())
        >>> x = torch.randn(16, 4)
        >>> sparsity.graph, sparsity.calls = trace(net, x), [("", ((x,), {}))]
        >>> [budget] = sparsity.add_budgets(net, {"2.weight": 3})
        >>> _ = sparsity.prune_(budget, 3, Score("normalized"))
        >>> shrinking = Shrinking(net, sparsity, [optimizer])
        >>> shrinking.shrink_()
        >>> net[0].weight.shape, net.state_dict()["0.weight"].shape
        (torch.Size([3, 4]), torch.Size([8, 4]))
        >>> shrinking.restore_()
        >>> net[0].weight.shape
        torch.Size([8, 4])
    """

    def __init__(self, module: nn.Module, sparsity: Sparsity, optimizers: Iterable[Optimizer]) -> None:
        if len(list(module.named_parameters(remove_duplicate=False))) > len(list(module.parameters())):
            raise ValueError("shrink is True, but the module has tied parameters; allowed is shrink=False")
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            if not is_elementwise(optimizer) or type(optimizer).__name__ == "Adafactor":
                raise ValueError(
                    f"shrink is True, but {type(optimizer).__name__} is not known to work element by element; allowed are "
                    "torch's own optimizers that do, or shrink=False"
                )
        self._module, self._sparsity = module, sparsity
        self._layers = layers_of(module)
        self._refused: set[str] = set()
        self._selects: dict[str, _Select] = {}
        self._select_handles: dict[str, RemovableHandle] = {}
        self._handles: list[RemovableHandle] = []
        for name, layer in self._layers.items():
            local = {"weight": name} | ({"bias": _bias(name)} if layer.bias is not None else {})
            kind = _FullLists if isinstance(layer, SparseLinear) else _FullFiles
            files = kind(sparsity.kept, local)
            self._handles += [
                layer._register_state_dict_hook(files.save),  # type: ignore[no-untyped-call]
                layer._register_load_state_dict_pre_hook(files.load),  # type: ignore[no-untyped-call]
            ]
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_state_dict_post_hook(self._full_state),
                optimizer.register_load_state_dict_pre_hook(self._small_state),
            ]

    @torch.no_grad()
    def shrink_(self) -> None:
        """Cut all units and features that are dead now; what the network does not allow to be cut is left, with a warning.

        Raises:
            ValueError: If the module's calls are not known, on which each cut is checked.
        """
        graph = self._sparsity.graph
        if graph is None:
            return
        if not self._sparsity.calls:
            raise ValueError("sparsity.calls is empty; allowed is at least one call, on which each cut is checked")
        self._sparsity.remove_dead_units_(self._optimizers)
        rows, columns = self._left_units(graph), self._unread_features(graph)
        if not (rows or columns) or not self._cut_all(rows, columns):
            return
        for name, left in rows.items():  # one at a time, to find which cannot be cut
            self._refuse(name, self._cut_all({name: left}, {}))
        for name, unread in columns.items():
            self._refuse(name, self._cut_all({}, {name: unread}))

    def _refuse(self, name: str, why: str) -> None:
        if why:
            self._refused.add(name)
            warnings.warn(
                f"shrink: {name} stays as large as it is while the fit goes on: {why}; compact cuts what it can",
                stacklevel=2,
            )

    def _cut_all(self, rows: dict[str, Tensor], unread: dict[str, Tensor]) -> str:
        """Cut units and features; undo it and return why, if the network does not allow it."""
        graph = self._sparsity.graph
        assert graph is not None
        before, undo = self._outputs(), self._snapshot()

        def run() -> list[Tensor]:
            self._cut(graph, rows, self._left_inputs(graph, rows, unread))
            return self._outputs()

        why = why_not(before, run, TOLERANCE)
        if why:
            undo()
        return why

    def _left_units(self, graph: Graph) -> dict[str, Tensor]:
        """Return which units of a layer are left, int64 ``(n,)`` by weight name, where not all are."""
        sparsity, left = self._sparsity, dict[str, Tensor]()
        for name in graph.hidden(self._layers):
            if name in self._refused or graph[name].axes.groups > 1:
                continue
            target = sparsity.targets[name]
            alive = may_feed(sparsity.masks, graph, sparsity.targets, name)[0]
            if name in sparsity.masks:
                alive = alive | ~sparsity.masks[name].closed_units(target.axes)[0]
            alive = alive.cpu()
            dead = all_but_one(~alive)
            if bool(dead.any()):
                left[name] = (~dead).nonzero().flatten()
        return left

    def _unread_features(self, graph: Graph) -> dict[str, Tensor]:
        """Return which inputs of a layer, fed by no unit, it does not read, bool ``(input,)`` by weight name."""
        sparsity, found = self._sparsity, dict[str, Tensor]()
        for name, layer in graph.items():
            is_known = name in self._layers and layer.unknown_source is None and layer.axes.groups == 1
            if not is_known or name in self._refused or name not in sparsity.masks:
                continue
            closed = sparsity.masks[name].closed_inputs(layer.axes)[0].cpu()
            unread = all_but_one(closed & (layer.sources.cpu() < 0))
            if bool(unread.any()):
                found[name] = unread
        return found

    def _left_inputs(self, graph: Graph, rows: dict[str, Tensor], unread: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return which inputs of a layer are left if units and unread features are cut, int64 ``(n,)`` by weight name."""
        left = dict[str, Tensor]()
        for name in graph:
            gone = self._fed_by_cut_units(graph, name, rows)
            if name in unread:
                gone |= unread[name]
            if bool(gone.any()):
                left[name] = (~gone).nonzero().flatten()
        return left

    @staticmethod
    def _fed_by_cut_units(graph: Graph, name: str, rows: dict[str, Tensor]) -> Tensor:
        """Tell which inputs of a layer are fed by units that are cut, bool ``(input,)``."""
        gone = torch.zeros(len(graph[name].sources), dtype=torch.bool)
        for producer in graph.feeding(name):
            if producer.weight in rows:
                inputs, units = graph.columns(name, producer.weight, torch.device("cpu"))
                cut = torch.ones(len(producer.units), dtype=torch.bool)
                cut[rows[producer.weight]] = False
                gone[inputs[cut[units]]] = True
        return gone

    def _cut(self, graph: Graph, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> None:
        if self._sparsity.full_graph is None:
            self._sparsity.full_graph = graph
        for name in dict.fromkeys((*rows, *columns)):
            layer = self._layers[name]
            self._cut_parameter(name, rows.get(name), columns.get(name))
            if name in rows:
                set_widths(layer, len(rows[name]), output=True)
                if layer.bias is not None:
                    self._cut_parameter(_bias(name), rows[name], None)
            if name in columns:
                set_widths(layer, len(columns[name]), output=False)
                self._select_inputs(name, ~self._fed_by_cut_units(graph, name, rows), columns[name])
        self._sparsity.graph = graph.cut(rows, columns)

    def _cut_parameter(self, name: str, rows: Tensor | None, columns: Tensor | None) -> None:
        sparsity, layer = self._sparsity, self._layers.get(name)
        if isinstance(layer, SparseLinear):
            sparsity.kept[name] = sparsity.kept.get(name, Kept.all_of(_shape(layer))).cut(rows, columns)
            layer.select_(rows, columns, self._optimizers)
            if isinstance(mask := sparsity.masks.get(name), ListMask):
                sparsity.masks.replace({name: mask.cut(rows, columns)})
            return
        parameter = sparsity.tensors[name]
        whole = Kept.all_of(parameter.shape)
        change = whole.cut(rows, columns)
        sparsity.kept[name] = sparsity.kept.get(name, whole).cut(rows, columns)
        replace_(parameter, change.select, self._optimizers)
        if name in sparsity.masks:
            mask = sparsity.masks[name]
            sparsity.masks.replace({name: Mask(change.select(mask.dead), change.select(mask.removed))})

    def _select_inputs(self, name: str, arriving: Tensor, left: Tensor) -> None:
        """Let a layer take, of what arrives (bool, of its inputs until now), only the inputs that are left."""
        old = self._selects.get(name)
        places = torch.arange(len(arriving)) if old is None else old.places.cpu()  # where each input until now arrived
        still = torch.ones(len(arriving) if old is None else old.n_arrive, dtype=torch.bool)
        still[places[~arriving]] = False
        renumbered = still.cumsum(0) - 1
        self._set_select(name, _Select(renumbered[places[left]], int(still.sum()), self._layers[name]))

    def _set_select(self, name: str, select: _Select | None) -> None:
        if name in self._selects:
            del self._selects[name]
            self._select_handles.pop(name).remove()
        if select is not None and len(select.places) < select.n_arrive:
            self._selects[name] = select
            self._select_handles[name] = change_input(self._layers[name], select)

    def _snapshot(self) -> Callable[[], None]:
        """Return what puts everything back as it is now."""
        sparsity = self._sparsity
        graph, kept, masks = sparsity.graph, dict(sparsity.kept), dict(sparsity.masks)
        tensors = {name: (p.data, p.grad) for name, p in sparsity.tensors.items()}
        states = [
            (optimizer, {p: dict(state) for p, state in optimizer.state.items()}) for optimizer in self._optimizers
        ]
        selects = dict(self._selects)
        patterns = [
            partial(
                layer.set_pattern_,
                layer.out_features,
                layer.in_features,
                layer.crow_indices.clone(),
                layer.col_indices.clone(),
            )
            for layer in self._layers.values()
            if isinstance(layer, SparseLinear)
        ]

        def undo() -> None:
            for name, (data, gradient) in tensors.items():
                set_tensor_(sparsity.tensors[name], data, gradient)
            for set_pattern_ in patterns:
                set_pattern_()
            for optimizer, state in states:
                for owner, values in state.items():
                    optimizer.state[owner].update(values)
            sparsity.graph = graph
            sparsity.kept.clear()
            sparsity.kept.update(kept)
            sparsity.masks.replace(masks)
            for name in {*selects, *self._selects}:
                self._set_select(name, selects.get(name))
            self._reset_widths()

        return undo

    def _reset_widths(self) -> None:
        for layer in self._layers.values():
            if isinstance(layer, SparseLinear):
                continue
            weight = layer.get_parameter("weight")
            set_widths(layer, weight.shape[0], output=True)
            set_widths(layer, weight.shape[1] * getattr(layer, "groups", 1), output=False)

    @torch.no_grad()
    def restore_(self) -> None:
        """Give all tensors their full shapes again, with zeros where something was cut."""
        sparsity = self._sparsity
        for name, kept in sparsity.kept.items():
            if isinstance(layer := self._layers.get(name), SparseLinear) and kept.columns is not None:
                layer.spread_(kept.rows, kept.columns, *kept.shape)
                continue
            replace_(sparsity.tensors[name], kept.expand, self._optimizers)
        sparsity.masks.replace(sparsity.masks.full(sparsity.kept))
        sparsity.kept.clear()
        if sparsity.full_graph is not None:
            sparsity.graph, sparsity.full_graph = sparsity.full_graph, None
        for handle in (*self._handles, *self._select_handles.values()):
            handle.remove()
        self._handles, self._selects, self._select_handles = [], {}, {}
        self._reset_widths()

    def _outputs(self) -> list[Tensor]:
        with float64_copy(self._module) as twin:
            twin.eval()
            return [leaf for call in self._sparsity.calls for leaf in replay(twin, *call)]

    def _full_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._changed(optimizer, state_dict, lambda kept, value: kept.expand(value), small=True)

    def _small_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._changed(optimizer, state_dict, lambda kept, value: kept.select(value), small=False)

    def _changed(
        self, optimizer: Optimizer, state_dict: dict[str, Any], change: Callable[[Kept, Tensor], Tensor], small: bool
    ) -> dict[str, Any]:
        """Return an optimizer's state with the tensors of small (or full) parameters changed."""
        names = {id(parameter): name for name, parameter in self._sparsity.tensors.items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = dict(state_dict["state"])
        for index, parameter in enumerate(parameters):
            name = names.get(id(parameter), "")
            if isinstance(self._layers.get(name), SparseLinear):
                continue
            kept = self._sparsity.kept.get(name)
            if kept is not None and index in states:
                shape = parameter.shape if small else kept.shape
                states[index] = {
                    key: change(kept, value)
                    if isinstance(value, Tensor) and value.ndim > 0 and value.shape == shape
                    else value
                    for key, value in states[index].items()
                }
        return {**state_dict, "state": states}


class _Select:
    """Lets a layer take, of the inputs that arrive, those that are left; it is copied and pickled with the layer."""

    def __init__(self, places: Tensor, n_arrive: int, layer: nn.Module) -> None:
        self.places, self.n_arrive, self.axis = places, n_arrive, -1 - n_kernel_axes(layer)

    def __call__(self, x: Tensor) -> Tensor:
        self.places = self.places.to(x.device)
        return x.index_select(self.axis, self.places)


class _FullFiles:
    """Hooks of a layer whose files have the full shapes; they can be copied and pickled with the module."""

    def __init__(self, kept: dict[str, Kept], names: dict[str, str]) -> None:
        self.kept, self.names = kept, names

    def save(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for local, name in self.names.items():
            if name in self.kept and prefix + local in state_dict:
                state_dict[prefix + local] = self.kept[name].expand(state_dict[prefix + local])

    def load(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for local, name in self.names.items():
            value = state_dict.get(prefix + local)
            if name in self.kept and isinstance(value, Tensor) and value.shape == self.kept[name].shape:
                small = self.kept[name].select(value)
                if value.ndim > 1 and int(small.count_nonzero()) < int(value.count_nonzero()):
                    raise ValueError(f"{name!r} was made smaller; the file has weights where nothing is left")
                state_dict[prefix + local] = small


class _FullLists(_FullFiles):
    """The same of a ``SparseLinear``, whose file has a pattern."""

    def __init__(self, kept: dict[str, Kept], names: dict[str, str]) -> None:
        self.weight = names["weight"]
        super().__init__(kept, {local: name for local, name in names.items() if local != "weight"})

    def save(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, rest: Any) -> None:
        """Number units and inputs as in the full layer."""
        super().save(layer, state_dict, prefix, rest)
        kept = self.kept.get(self.weight)
        if kept is None or kept.columns is None or prefix + "crow_indices" not in state_dict:
            return
        crow, col = (state_dict[f"{prefix}{part}_indices"] for part in ("crow", "col"))
        crow, col = spread(crow, col, kept.rows, kept.columns, kept.shape[0])
        state_dict[f"{prefix}crow_indices"], state_dict[f"{prefix}col_indices"] = crow, col
        state_dict[f"{prefix}shape"] = torch.tensor(list(kept.shape), device=crow.device)

    def load(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Number units and inputs as in the small layer."""
        super().load(state_dict, prefix, *rest)
        kept = self.kept.get(self.weight)
        shape = state_dict.get(f"{prefix}shape")
        if kept is None or kept.columns is None or shape is None or shape.tolist() != list(kept.shape):
            return
        crow, col = (state_dict[f"{prefix}{part}_indices"] for part in ("crow", "col"))
        counts = crow.diff()[kept.rows.to(crow.device)]
        numbers = renumbered(kept.shape[1], kept.columns).to(col)
        if int(counts.sum()) < len(col) or bool((numbers[col] < 0).any()):
            raise ValueError(f"{self.weight!r} was made smaller; the file has weights where nothing is left")
        state_dict[f"{prefix}crow_indices"], state_dict[f"{prefix}col_indices"] = starts(counts), numbers[col]
        state_dict[f"{prefix}shape"] = torch.tensor([len(kept.rows), len(kept.columns)], device=shape.device)


def _shape(layer: SparseLinear) -> torch.Size:
    return torch.Size((layer.out_features, layer.in_features))


def is_shrunk(module: nn.Module) -> bool:
    """Tell whether a module is being made smaller while it trains."""
    hooks = (hook for part in module.modules() for hook in part._state_dict_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), _FullFiles) for hook in hooks)


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"
