"""A module and its masks: what the algorithms act on, in a callback or in a loop of your own."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpna.cells import cells_of, wide
from lightning_cpna.graph import Graph
from lightning_cpna.mask import Kept, ListMask, Mask
from lightning_cpna.masks import Masks
from lightning_cpna.moments import zero_
from lightning_cpna.report import BudgetReport, SparsityReport, may_feed, sparsity_report
from lightning_cpna.scores import Granularity, Score, ScoreFunction, ScoreInputs
from lightning_cpna.selection import keep_top_rows
from lightning_cpna.targets import Axes, ListedAxes, Target, all_targets, n_keep, resolve

if TYPE_CHECKING:  # a stack, which is replayed otherwise, has masks
    from lightning_cpna.replay import Calls

Scope = Literal["layer", "shared"]


@dataclass(frozen=True)
class Budget:
    """How many connections, features or units should remain of one parameter, or of several together.

    Attributes:
        label: What the user called it: a parameter's name, or the pattern of a shared budget.
        names: The parameters.
        granularity: What is counted.
        n_end: How many should remain (of each member of a stacked network).
    """

    label: str
    names: tuple[str, ...]
    granularity: Granularity
    n_end: int


class Sparsity:
    """What is known of one module's sparsity: its parameters, masks, traced layers and budgets.

    Args:
        module: Any module.

    Attributes:
        targets: The module's parameters by canonical name, with their axes.
        tensors: The same, parameters only.
        masks: The masks of those that have one.
        graph: The traced layers (from ``trace``), or None as long as nobody traced the module.
        calls: The calls that a callback traced.
        untraced: Why it could not trace them.
        budgets: Every budget that somebody works towards.
        kept: What is left of parameters that were made smaller (by ``Shrinking``): masks and graph are then as small.
        full_graph: The graph as it was before, while parameters are smaller.
        drops: Whether a ``SparseLinear`` drops dead connections at once; if not, it keeps them as zeros.

    Examples:
        >>> from lightning_cpna import Score, trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sparsity = Sparsity(net)
        >>> sparsity.graph = trace(net, torch.randn(16, 4))
        >>> [budget] = sparsity.add_budgets(net, {"2.weight": 3})
        >>> _ = sparsity.prune_(budget, 3, Score("normalized"))
        >>> sparsity.remove_dead_units_()
        >>> [layer.connections for layer in sparsity.report().layers]
        [3, 12]
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # which may hold this object, as the values of a table of modules do
        self.targets: dict[str, Target] = {}
        self.masks = Masks()
        self.graph: Graph | None = None
        self.calls: Calls = []
        self.untraced: str | None = None
        self.budgets: list[Budget] = []
        self.kept: dict[str, Kept] = {}
        self.full_graph: Graph | None = None
        self.drops = True
        # The counts, and the mask and its version of which they are the counts.
        self._known: dict[tuple[str, Granularity], tuple[tuple[Mask, int], list[int]]] = {}
        self.find_targets(module)

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this Sparsity is gone; keep it as long as its masks are used")
        return module

    def find_targets(self, module: nn.Module) -> None:
        """Look up the module's parameters (anew), and check that the masks are masks of this module.

        Raises:
            ValueError: If a mask names a parameter that is not there, or has another shape.
        """
        self.targets = all_targets(module)
        self.tensors = {name: target.parameter for name, target in self.targets.items()}
        for name in self.masks:
            if name not in self.targets:
                raise ValueError(
                    f"there is a mask for {name!r}, but no such parameter: it belongs to another architecture"
                )
            self.add_mask(name)

    def load_masks(self, state: Mapping[str, Any]) -> None:
        """Take the masks of a ``Masks.state_dict()`` in the place of those that are there.

        Raises:
            ValueError: If they are of another architecture, or of a version that this release does not know; then
                those that were there stay.
        """
        before = self.masks
        self.masks = Masks.of(state)
        try:
            self.find_targets(self.module)
        except ValueError:
            self.masks = before
            raise

    def add_mask(self, name: str) -> None:
        """Give a parameter a mask, if it has none."""
        target = self.targets[name]
        self.masks.add(name, target.parameter, target.axes)

    def add_budgets(
        self,
        module: nn.Module,
        wanted: Mapping[str, int | float],
        granularity: Granularity = "connection",
        scope: Scope = "layer",
    ) -> list[Budget]:
        """Turn what a user wants to remain into budgets, and give their parameters masks.

        Args:
            module: The module.
            wanted: From name pattern to the count (int) or density (float in (0, 1)) that should remain.
            granularity: What is counted: connections, input features or units.
            scope: "layer": every parameter that a pattern matches gets its own budget. "shared": they share one.

        Raises:
            ValueError: If a pattern matches nothing, or a bias beside weights, or more should remain than there are.
        """
        budgets = []
        for pattern, targets in resolve(module, wanted).items():
            others = [target.name for target in targets if target.axes.input is None]
            if others and len(others) < len(targets):
                raise ValueError(
                    f"targets: {pattern!r} matches {others[0]!r} too, which is no weight of a layer (such as a bias or the "
                    "scale of a normalisation); allowed are patterns of either"
                )
            for target in targets:
                if granularity == "feature" and target.axes.input is None:
                    raise ValueError(f"granularity='feature': {target.name!r} has no input axis; allowed are weights")
                if granularity == "feature" and target.axes.groups > 1:
                    raise ValueError(
                        f"granularity='feature': {target.name!r} is grouped, so that a column of it is several features; "
                        "allowed are layers without groups, or another granularity"
                    )
                self.masks.add(target.name, target.parameter, target.axes)
            names = [target.name for target in targets]
            for label, members in [(pattern, names)] if scope == "shared" else [(name, [name]) for name in names]:
                total = sum(_size(self.targets[name], granularity) for name in members)
                n_end = n_keep(wanted[pattern], total, label)
                if n_end < len(members):
                    raise ValueError(
                        f"targets: {n_end} should remain of {label!r}, whose {len(members)} layers keep one each; "
                        f"allowed is {len(members)} or more"
                    )
                budgets.append(Budget(label, tuple(members), granularity, n_end))
        self.budgets += budgets
        return budgets

    def n_remaining(self, budget: Budget) -> int:
        """Count what remains; in a stacked network, of the member with the most."""
        return max(self.counts(budget))

    def live_counts(self) -> dict[str, int]:
        """Count what lives in each weight that was traced or has a mask."""
        names = dict.fromkeys((*(self.graph or ()), *self.masks))
        return {name: self.masks[name].n_live if name in self.masks else self.tensors[name].numel() for name in names}

    def n_live(self) -> int:
        """Count what lives in all of them."""
        return sum(self.live_counts().values())

    def n_connections(self) -> int:
        """Count all connections of these weights, live or not, in their full shapes."""
        return sum(self.size(name) for name in dict.fromkeys((*(self.graph or ()), *self.masks)))

    def n_units(self, name: str) -> int:
        """Count the units of a parameter that are not removed."""
        self.add_mask(name)
        return max(self._counts_of(name, "unit", None))

    def counts(self, budget: Budget, without: tuple[str, Tensor] | None = None) -> list[int]:
        """Count what remains in each member (a network that is no stack is one).

        Args:
            budget: What is counted.
            without: A parameter, and units of it that are left out, bool ``(member, unit)``.
        """
        counts = []
        for name in budget.names:
            gone = without[1] if without is not None and without[0] == name else None
            counts.append(self._counts_of(name, budget.granularity, gone))
        return [sum(members) for members in zip(*counts, strict=True)]

    def _counts_of(self, name: str, granularity: Granularity, without: Tensor | None) -> list[int]:
        if name not in self.masks:  # other masks can have been set since
            self.add_mask(name)
        mask, axes = self.masks[name], self.targets[name].axes
        if without is not None:
            where = self._spread(name, without, "unit")
            if not isinstance(mask, ListMask):
                return _count_groups(Mask(mask.dead | where, mask.removed | where), axes, granularity)
            if granularity == "connection":
                return [mask.n_live - int((where & mask.live).sum())]
            closed = mask.closed_units(axes) | without if granularity == "unit" else mask.closed_inputs(axes)
            return [int((~closed).sum())]
        if granularity == "connection" and axes.member is None:
            return [mask.n_live]
        key, made = (name, granularity), (mask, mask.version)
        if key not in self._known or self._known[key][0] != made:
            self._known[key] = (made, _count_groups(mask, axes, granularity))
        return self._known[key][1]

    @torch.no_grad()
    def prune_(
        self,
        budget: Budget,
        n: int | Sequence[int],
        score: ScoreFunction,
        *,
        optimizers: Iterable[Optimizer] = (),
        generator: torch.Generator | None = None,
        agree: Callable[[Tensor], Tensor] = lambda keep: keep,
    ) -> float:
        """Remove for good, in place, all but the ``n`` best connections, features or units of a budget.

        Args:
            budget: Which parameters, and what is counted.
            n: How many stay, exactly, of each member; several numbers are one for each.
            score: Scores the connections; features and units are scored by the norm of their connections' scores.
            optimizers: Whose moments of the removed connections are set to zero.
            generator: For scores that draw.
            agree: Given the decision (bool), answers the one that every process takes.

        Returns:
            The lowest score that stayed.

        Raises:
            ValueError: If fewer than ``n`` remain, a score is NaN, or the score needs something that is not there.
        """
        generator = generator or torch.Generator().manual_seed(getattr(score, "seed", 0))
        scores = [self._candidates(name, budget.granularity, score, generator) for name in budget.names]
        return self._keep_best_(budget, n, scores, optimizers, agree)

    @torch.no_grad()
    def prune_units_(
        self,
        budget: Budget,
        n: int | Sequence[int],
        scores: Mapping[str, Tensor],
        *,
        means: Mapping[str, Tensor] | None = None,
        optimizers: Iterable[Optimizer] = (),
        agree: Callable[[Tensor], Tensor] = lambda keep: keep,
    ) -> float:
        """Remove for good, in place, all but the ``n`` best units of a budget, with what they are fed and what they feed.

        Args:
            budget: Which layers; its granularity is "unit".
            n: How many stay, exactly, of each member; several numbers are one for each.
            scores: The score of each unit, ``(member, unit)``, by weight name (from a ``UnitScore``). Where layers share the
                budget, those of each layer are divided by their norm over the units that are left.
            means: The mean of each input of the layers that the units feed, ``(input,)``, by weight name (from
                ``Watch.means``); what a removed unit fed them in the mean goes into their biases. None: it is lost.
            optimizers: Whose moments of the removed connections are set to zero.
            agree: Given the decision (bool), answers the one that every process takes.

        Returns:
            The lowest score that stayed.

        Raises:
            ValueError: If fewer than ``n`` remain, a score is NaN, the units' readers are not all known, or one of them
                has no bias that could take the mean.
        """
        candidates = []
        for name in budget.names:
            self.with_removable_units(name)
            gone = self.masks[name].closed_units(self.targets[name].axes)  # (member, unit)
            if scores[name].shape[-1:] != gone.shape[1:]:
                raise ValueError(
                    f"scores: that of {name!r} has shape {tuple(scores[name].shape)}; allowed is one number a unit, "
                    f"{tuple(gone.shape)}"
                )
            own = wide(scores[name].to(gone.device))
            own = own.expand(gone.shape).clamp(min=torch.finfo(own.dtype).min)
            if len(budget.names) > 1:  # so that layers can be compared (Evci 2018)
                norm = own.masked_fill(gone, 0.0).norm(dim=1, keepdim=True)
                own = own / norm.clamp(min=torch.finfo(own.dtype).tiny)
            candidates.append(own.masked_fill(gone, -torch.inf))
        return self._keep_best_(budget, n, candidates, optimizers, agree, means)

    def _keep_best_(
        self,
        budget: Budget,
        n: int | Sequence[int],
        scores: list[Tensor],
        optimizers: Iterable[Optimizer],
        agree: Callable[[Tensor], Tensor],
        means: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Remove all but the ``n`` best candidates, ``(member, candidate)`` of each layer; return the lowest that stayed."""
        decision, lowest = self._decide(budget, scores, self._wanted(budget, n))
        decision = agree(decision)
        sizes = [candidates.shape[1] for candidates in scores]
        keeps = torch.split(decision, sizes, dim=1) if len(sizes) > 1 else [decision]
        for name, keep in zip(budget.names, keeps, strict=True):
            if self._is_listed(name, budget.granularity):
                self._zero_(name, self.masks[name].keep_(keep[0]), optimizers)
            else:
                self._remove_groups_(name, ~keep, budget.granularity, optimizers, means)
        return lowest

    def _wanted(self, budget: Budget, n: int | Sequence[int]) -> list[int]:
        """Turn what should stay into one number a member; of one number, a member that has fewer keeps all."""
        remaining = self.counts(budget)
        if not isinstance(n, Sequence):
            if operator.index(n) <= max(remaining):
                return [min(n, own) for own in remaining]
        elif len(n) == len(remaining) and all(wanted <= own for wanted, own in zip(n, remaining, strict=True)):
            return list(n)
        there = remaining if isinstance(n, Sequence) and len(remaining) > 1 else max(remaining)
        raise ValueError(f"n is {n}; allowed is what remains of {budget.label!r}, {there}, or less")

    def _decide(self, budget: Budget, scores: list[Tensor], wanted: list[int]) -> tuple[Tensor, float]:
        """Keep the best of each member; members that should keep as many are asked together."""
        if len(set(wanted)) == 1:
            return self._keep_every_layer(budget, scores, wanted[0])
        shape = len(wanted), sum(candidates.shape[1] for candidates in scores)
        decision, lowest = torch.empty(shape, dtype=torch.bool, device=scores[0].device), torch.inf
        for n in set(wanted):
            members = cells_of(torch.tensor([own == n for own in wanted], device=scores[0].device))
            own = [candidates.index_select(0, members) for candidates in scores]
            decision[members], lowest_of_them = self._keep_every_layer(budget, own, n)
            lowest = min(lowest, lowest_of_them)
        return decision, lowest

    def _is_listed(self, name: str, granularity: Granularity) -> bool:
        """Tell whether the candidates are the list of live connections: what is dead already then costs nothing."""
        axes = self.targets[name].axes
        return granularity == "connection" and axes.member is None and axes.unit == 0 and axes.input in (None, 1)

    def _candidates(
        self, name: str, granularity: Granularity, score: ScoreFunction, generator: torch.Generator
    ) -> Tensor:
        """Score what may go, ``(member, candidate)``; ``-inf`` marks what went before."""
        target, axes = self.targets[name], self.targets[name].axes
        self.add_mask(name)
        mask, is_listed = self.masks[name], self._is_listed(name, granularity)
        if is_listed and isinstance(score, Score):
            live, groups = mask.live_cells, mask.live_groups
            return score(ScoreInputs(target, self.tensors, self.graph, generator, cells=live, groups=groups))[None]
        cells = torch.arange(len(mask.dead), device=mask.dead.device) if isinstance(mask, ListMask) else None
        scores = score(ScoreInputs(target, self.tensors, self.graph, generator, self.kept.get(name), cells))
        dead = axes.view(mask.dead)  # (member, unit, input, *kernel)
        scores = wide(scores).expand(dead.shape)
        if not isinstance(score, Score):  # a function may answer -inf, which must not mean that a connection is dead
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        if is_listed:
            return scores.reshape(1, -1).index_select(1, mask.live_cells)
        if granularity == "connection":
            return scores.masked_fill(dead, -torch.inf).flatten(1)
        squares = torch.empty_like(mask.dead, dtype=scores.dtype)
        axes.view(squares).copy_(scores.masked_fill(dead, 0.0).square())
        if granularity == "unit":
            return axes.sum_of_units(squares).sqrt().masked_fill(mask.closed_units(axes), -torch.inf)
        return axes.sum_of_inputs(squares).sqrt().masked_fill(mask.closed_inputs(axes), -torch.inf)

    def _keep_every_layer(self, budget: Budget, scores: list[Tensor], n: int) -> tuple[Tensor, float]:
        """Keep the ``n`` best, but of every layer at least the best one: no layer of a shared budget collapses."""
        if len(scores) == 1:
            return keep_top_rows(scores[0], n)
        rows, sizes = torch.cat(scores, dim=1), [candidates.shape[1] for candidates in scores]
        keep, lowest = keep_top_rows(rows, n)
        parts = zip(torch.split(keep, sizes, dim=1), torch.split(rows > -torch.inf, sizes, dim=1), strict=True)
        empty = [i for i, (kept, live) in enumerate(parts) if bool((live.any(1) & ~kept.any(1)).any())]
        if not empty:
            return keep, lowest
        names = ", ".join(budget.names[i] for i in empty)
        warnings.warn(
            f"the budget of {budget.label!r} would leave nothing of {names}; its best one is kept",
            stacklevel=5,
        )
        floored = rows.clone()
        for part in torch.split(floored, sizes, dim=1):
            if part.numel():
                best = part.max(dim=1, keepdim=True)
                part.scatter_(1, best.indices, torch.where(best.values.isneginf(), best.values, torch.inf))
        keep, _ = keep_top_rows(floored, n)
        return keep, float(rows[keep].min())

    def _remove_groups_(
        self,
        name: str,
        gone: Tensor,
        granularity: Granularity,
        optimizers: Iterable[Optimizer],
        means: Mapping[str, Tensor] | None,
    ) -> None:
        """Remove groups of connections, bool ``(member, group)``."""
        if granularity == "unit":
            if means is not None:
                self.propagate_means_(name, gone, means)
            self._remove_outgoing_(name, gone, optimizers)
        self._close_(name, gone, granularity, optimizers)

    def _close_(self, name: str, gone: Tensor, granularity: Granularity, optimizers: Iterable[Optimizer]) -> None:
        """Remove all that some connections, units or inputs (bool, ``(member, group)``) have or may ever have."""
        self.add_mask(name)
        if isinstance(mask := self.masks[name], ListMask):
            if granularity == "unit":
                mask.close_(units=gone[0])
            elif granularity == "feature":
                mask.close_(inputs=gone[0])
        self.remove_(name, self._spread(name, gone, granularity), optimizers)

    def _spread(self, name: str, groups: Tensor, granularity: Granularity) -> Tensor:
        """Lay what is known of groups, bool ``(member, group)``, along the connections: bool of the parameter's shape."""
        where, axes = torch.empty_like(self.masks[name].dead), self.targets[name].axes
        view = axes.view(where)  # (member, unit, input, *kernel)
        if granularity == "connection":
            view.copy_(groups.view(view.shape))
        else:
            view.copy_((axes.along_units if granularity == "unit" else axes.along_inputs)(groups, where))
        return where

    def with_removable_units(self, name: str) -> Graph:
        """Return the graph, which knows everything that the units of a parameter feed.

        Raises:
            ValueError: If it does not, or if the units are the output of the network.
        """
        graph = self.graph
        if graph is None:
            why = "the module was not traced"
        elif name not in graph:
            why = "it is no Linear or Conv weight that the trace saw"
        elif graph[name].is_output:
            why = "they are the output of the network"
        elif (lost := graph[name].lost) is not None:
            why = lost
        else:
            return graph
        allowed = "" if graph is None else ", ".join(o for o, x in graph.items() if not x.is_output and not x.lost)
        raise ValueError(
            f"targets: the units of {name!r} cannot be removed: {why}; allowed are hidden layers whose units can be "
            f"followed, here: {allowed or 'none'}"
        )

    @torch.no_grad()
    def propagate_means_(self, name: str, units: Tensor, means: Mapping[str, Tensor]) -> None:
        """Add what some units feed in the mean to the biases of the layers that read them, in place (bias propagation).

        The outputs are then what they would be if the units were replaced by their means; for convolutions that pad, so
        only away from the borders, where the padding stands for the unit's zeros, not for its mean.

        Args:
            name: The units' layer.
            units: Which units, bool ``(member, unit)``.
            means: The mean of each input of the layers that read them, ``(input,)``, by weight name.

        Raises:
            ValueError: If one of those layers has no bias, and something would have to be added to it.
        """
        graph = self.with_removable_units(name)
        shifts = []
        for consumer in graph.fed_by(name):
            w, axes = self.tensors[consumer.weight], consumer.axes
            read = graph.at_inputs(units, consumer.weight, name, default=False)  # (member, input)
            given = torch.empty_like(w)
            mean = torch.where(read, means[consumer.weight].to(w), 0.0)
            axes.view(given).copy_(axes.view(w) * axes.along_inputs(mean, w))
            shift = axes.sum_of_units(given)  # (member, unit)
            if consumer.bias is not None:
                shifts.append((consumer, consumer.bias, shift))
            elif bool(shift.any()):
                raise ValueError(
                    f"{consumer.weight!r}, which reads the units of {name!r}, has no bias to which their mean could be "
                    "added; allowed is compensate=None, or bias=True in that layer"
                )
        for consumer, bias, shift in shifts:
            consumer.axes.view_bias(self.tensors[bias]).add_(shift)
            if bias in self.masks:
                self.masks[bias].apply_(self.tensors[bias])

    def _remove_outgoing_(self, name: str, units: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Remove the connections that some units (bool, ``(member, unit)``) feed."""
        graph = self.with_removable_units(name)
        for consumer in graph.fed_by(name):
            read = graph.at_inputs(units, consumer.weight, name, default=False)  # (member, input)
            self._close_(consumer.weight, read, "feature", optimizers)

    @torch.no_grad()
    def remove_(self, name: str, where: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
        """Remove connections for good, in place: mask, weights, gradients and moments.

        Args:
            name: The parameter.
            where: Which connections, bool of the parameter's shape (or one that expands to it).
            optimizers: Whose moments of them are set to zero.
        """
        self.add_mask(name)
        cells = cells_of(where.expand(self.masks[name].dead.shape))
        self.masks[name].remove_cells_(cells)
        self._zero_(name, cells, optimizers)

    def _zero_(self, name: str, cells: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Set dead connections to zero, or drop them from a list of connections."""
        if isinstance(self.masks[name], ListMask) and self.drops:
            self.drop_dead_(optimizers)
        else:
            zero_(self.targets[name].parameter, cells, optimizers)

    def drop_dead_(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Take the dead connections of every ``SparseLinear`` out of it."""
        for name, mask in self.masks.items():
            axes = self.targets[name].axes
            if isinstance(mask, ListMask) and isinstance(axes, ListedAxes) and not mask.all_live:
                dead = mask.dead
                mask.drop_(axes)
                axes.layer.drop_(dead, optimizers)

    def remove_dead_units_(self, optimizers: Iterable[Optimizer] = (), members: Sequence[bool] | None = None) -> None:
        """Remove the incoming connections of units that feed nothing, unless a budget needs them to reach its count.

        Args:
            optimizers: Whose moments of these connections are set to zero.
            members: Of which members; None: of all.
        """
        if (graph := self.graph) is None:
            return
        for name in reversed(list(graph)):
            if graph[name].lost or graph[name].is_output or not graph.fed_by(name):
                continue
            dead = ~may_feed(self.masks, graph, self.targets, name)  # (member, unit)
            if members is not None:
                dead &= torch.tensor(members, device=dead.device)[:, None]
            if not bool(dead.any()):
                continue
            self.add_mask(name)
            if not bool((self._spread(name, dead, "unit") & self.masks[name].live).any()):
                continue
            for budget in self.budgets:
                if name in budget.names:
                    left = torch.tensor(self.counts(budget, (name, dead)), device=dead.device)
                    dead &= (left >= budget.n_end)[:, None]
            if bool(dead.any()):
                self._close_(name, dead, "unit", optimizers)

    def mask_gradients_(self) -> None:
        """Set the gradients of connections that do not live to zero, in place; call it before each optimizer step."""
        for name, mask in self.masks.items():
            gradient = self.tensors[name].grad
            if gradient is not None:
                mask.apply_(gradient)

    def report(self) -> SparsityReport:
        """Count what is alive in every masked parameter, in its full shape."""
        for name in self.masks:
            self.add_mask(name)
        budgets = [
            BudgetReport(budget.label, budget.granularity, self.n_remaining(budget), budget.n_end)
            for budget in self.budgets
            if all(name in self.masks for name in budget.names)  # other masks can have been set since
        ]
        targets, graph = dict(self.targets), self.full_graph or self.graph
        for name, kept in self.kept.items():
            if isinstance(axes := targets[name].axes, ListedAxes) and kept.columns is not None:
                targets[name] = replace(targets[name], axes=axes.spread(kept.rows, kept.columns, kept.shape))
        if graph is not None and self.kept:
            graph = graph.with_axes({name: target.axes for name, target in targets.items()})
        return sparsity_report(self.masks.full(self.kept), targets, graph, budgets)

    def size(self, name: str) -> int:
        """Return the number of a parameter's connections, in its full shape."""
        if name in self.kept:
            return self.kept[name].shape.numel()
        return self.targets[name].axes.size(self.tensors[name])


def _count_groups(mask: Mask, axes: Axes, granularity: Granularity) -> list[int]:
    """Count in each member the connections that live, or the features or units that are not removed for good."""
    if granularity == "connection":
        there = axes.view(mask.live).flatten(1)
    else:
        there = ~(mask.closed_units(axes) if granularity == "unit" else mask.closed_inputs(axes))
    counts: list[int] = there.sum(1).tolist()
    return counts


def _size(target: Target, granularity: Granularity) -> int:
    """Count the groups of one member of a parameter, live or not; of a list of connections, those that it holds."""
    axes, parameter = target.axes, target.parameter
    if granularity == "connection":
        return parameter.numel() // axes.n_members(parameter)
    return axes.n_units(parameter) if granularity == "unit" else axes.n_inputs(parameter)


_SPARSITY: WeakKeyDictionary[nn.Module, Sparsity] = WeakKeyDictionary()


def sparsity_of(module: nn.Module) -> Sparsity:
    """Return what is known of a module's sparsity, the same for everyone who asks; made at the first time."""
    module = getattr(module, "_orig_mod", module)
    if module not in _SPARSITY:
        _SPARSITY[module] = Sparsity(module)
    return _SPARSITY[module]
