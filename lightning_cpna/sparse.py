"""Layers that store only their live connections."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import handle_torch_function, has_torch_function

from lightning_cpna.cells import cells_of, count_true, distinct, divided, n_up_to, others, renumbered
from lightning_cpna.draws import draw_cells
from lightning_cpna.moments import moments_of, replace_, set_tensor_
from lightning_cpna.pattern import Pattern, of_rows, pattern_of, rows_of, sparse_matmul, starts
from lightning_cpna.targets import Axes, ListedAxes
from lightning_cpna.topology import n_connections

INDICES = ("crow_indices", "col_indices")  # the buffers that say which connections there are


class Exchange(NamedTuple):
    """Which connections go, and which come in the place of as many.

    Attributes:
        dying: Which go, as ascending places in ``weight``, int64 ``(n,)``.
        staying: Which stay, as ascending places in ``weight``, int64.
        cells: Which come, ascending, int64 ``(n,)``; none of them stays anyway.
        places: Where in ``weight`` these will be, ascending, int64 ``(n,)``.
        values: Their values, ``(n,)``.
    """

    dying: Tensor
    staying: Tensor
    cells: Tensor
    places: Tensor
    values: Tensor


class SparseLinear(nn.Module):
    """``y = x A' + b`` with a sparse ``A`` that is never dense: memory and time are linear in its connections.

    The values of the connections are a 1-D parameter, which any optimizer can train; which connections they are is an int32
    pattern in buffers (CSR). Batches are kept features-major inside: what comes out is a transposed view, which elementwise
    layers and a further ``SparseLinear`` take as it is, so nothing is copied between them.

    Values of low precision are multiplied in float32.

    Args:
        in_features: The number of inputs.
        out_features: The number of units.
        epsilon: About how many connections: ``round(epsilon * (in_features + out_features))``, or all if that is more (SET,
            Mocanu et al. 2018, Eq. 1).
        bias: Whether units have a bias.
        replace: Whether so many connections are drawn with replacement, so that there are slightly fewer (as in NPSET).
        generator: Draws the connections and their values; None is torch's global one.
        device: Where the layer is made.
        dtype: The type of the values.

    Attributes:
        weight: The values, ``(connection,)``, ordered by unit and then by input.
        bias: The biases, ``(out_features,)``, or None.
        crow_indices: Where each unit's connections begin, int32 ``(out_features + 1,)``.
        col_indices: The input of each connection, int32 ``(connection,)``.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> layer = SparseLinear(1000, 500, epsilon=2)
        >>> layer.weight.shape, layer(torch.randn(8, 1000)).shape
        (torch.Size([3000]), torch.Size([8, 500]))
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    ccol_indices: Tensor
    row_indices: Tensor
    order: Tensor
    shape: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        epsilon: float = 20.0,
        *,
        bias: bool = True,
        replace: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed is an int >= 1")
        n = n_connections(in_features, out_features, epsilon)
        if n >= 2**31:
            raise ValueError(f"epsilon is {epsilon}: {n} connections; allowed are fewer than 2**31 in a layer")
        self._build(in_features, out_features, bias, device, dtype)
        n_cells = in_features * out_features
        if replace:
            n_draws = max(1, round(epsilon * (in_features + out_features)))
            cells = distinct(torch.randint(n_cells, (n_draws,), generator=generator))
        else:
            cells = draw_cells(torch.empty(0, dtype=torch.int64), n_cells, n, generator).cells
        self.set_cells_(cells)
        self.reset_parameters(generator)

    def _build(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        device = self.weight.device
        self.register_buffer("shape", torch.tensor([out_features, in_features], device=device))
        for name in INDICES:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32, device=device))
        for name in ("ccol_indices", "row_indices", "order"):  # the same by input, made from the others
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32, device=device), persistent=False)

    @classmethod
    def from_cells(
        cls, cells: Tensor, values: Tensor, bias: Tensor | None, in_features: int, out_features: int
    ) -> Self:
        """Make a layer of given connections.

        Args:
            cells: ``unit * in_features + input`` of each, int64 ``(connection,)``, ascending, each once.
            values: Their values, ``(connection,)``.
            bias: The biases, ``(out_features,)``, or None.
            in_features: The number of inputs.
            out_features: The number of units.

        Raises:
            ValueError: If the cells are not ascending, or beyond the layer, or there are other numbers of values or biases.
        """
        if values.shape != cells.shape or (bias is not None and bias.shape != (out_features,)):
            shapes = tuple(values.shape), None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"values and bias have shapes {shapes}; allowed are {tuple(cells.shape)}, as cells, and {(out_features,)}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(in_features, out_features, bias is not None, values.device, values.dtype)
        layer.set_cells_(cells)
        with torch.no_grad():
            layer.weight.copy_(values)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @classmethod
    def from_dense(cls, linear: nn.Linear, live: Tensor | None = None) -> Self:
        """Take the live connections of a dense layer.

        Args:
            linear: The layer.
            live: Which live, bool ``(out_features, in_features)``, as ``masks[name].live``; None: those that are not zero.

        Examples:
            >>> linear = nn.Linear(3, 2)
            >>> layer = SparseLinear.from_dense(linear, torch.tensor([[True, False, True], [False, True, False]]))
            >>> layer.to_dense().weight.count_nonzero()
            tensor(3)
        """
        weight = linear.weight.detach()
        if live is not None and live.shape != weight.shape:
            raise ValueError(f"live has shape {tuple(live.shape)}; allowed is the weight's, {tuple(weight.shape)}")
        cells = cells_of(weight != 0 if live is None else live.to(weight.device))
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_cells(cells, weight.flatten()[cells], bias, linear.in_features, linear.out_features)

    @classmethod
    def from_csr(cls, matrix: Tensor, bias: Tensor | None = None) -> Self:
        """Take the entries of a ``torch.sparse`` CSR matrix, ``(out_features, in_features)``, explicit zeros among them."""
        if matrix.layout != torch.sparse_csr or matrix.ndim != 2:
            raise ValueError(
                f"matrix is {matrix.ndim}-D with layout {matrix.layout}; allowed is 2-D in torch.sparse_csr"
            )
        n_out, n_in = matrix.shape
        counts = matrix.crow_indices().diff()
        rows = torch.repeat_interleave(torch.arange(n_out, device=matrix.device), counts)
        cells, order = (rows * n_in + matrix.col_indices()).sort()
        return cls.from_cells(cells, matrix.values().detach()[order], bias, n_in, n_out)

    def to_csr(self) -> Tensor:
        """Return a ``torch.sparse`` CSR matrix of the connections, ``(out_features, in_features)``, a copy."""
        return torch.sparse_csr_tensor(
            self.crow_indices.clone(),
            self.col_indices.clone(),
            self.weight.detach().clone(),
            (self.out_features, self.in_features),
            check_invariants=False,
        )

    def to_dense(self) -> nn.Linear:
        """Return a dense layer that computes the same; its mask is ``live``."""
        linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.zero_().view(-1)[self.cells] = self.weight
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    @property
    def live(self) -> Tensor:
        """Which connections of the dense layer there are, bool ``(out_features, in_features)``."""
        live = torch.zeros(self.out_features * self.in_features, dtype=torch.bool, device=self.weight.device)
        live[self.cells] = True
        return live.view(self.out_features, self.in_features)

    @property
    def cells(self) -> Tensor:
        """``unit * in_features + input`` of each connection, int64 ``(connection,)``, ascending."""
        firsts = torch.arange(self.out_features, device=self.weight.device) * self.in_features
        return of_rows(firsts, self.crow_indices, len(self.col_indices)).add_(self.col_indices.long())

    @property
    def units(self) -> Tensor:
        """The unit of each connection, int32 ``(connection,)``."""
        return rows_of(self.crow_indices, len(self.col_indices))

    @property
    def pattern(self) -> Pattern:
        """Which connections there are, by unit and by input."""
        return Pattern(self.crow_indices, self.col_indices, self.ccol_indices, self.row_indices, self.order)

    @property
    def parameter_axes(self) -> Mapping[str, Axes]:
        """How masks and scores find a connection's unit and input."""
        return {"weight": ListedAxes(find=weakref.ref(self))}

    @torch.no_grad()
    def set_cells_(self, cells: Tensor) -> None:
        """Make the connections those in some cells, ascending; the values are zero where their number is a new one.

        Raises:
            ValueError: If the cells are not ascending, or beyond the layer.
        """
        self._check_cells(cells)
        self._set_cells(cells)
        self._renew_values(len(cells))

    def _check_cells(self, cells: Tensor) -> None:
        """Refuse cells that are not ascending, or beyond the layer."""
        if len(cells) and not (int(cells[0]) >= 0 and int(cells[-1]) < self.in_features * self.out_features):
            raise ValueError(
                f"cells reach from {int(cells[0])} to {int(cells[-1])}; allowed is 0 to "
                f"{self.in_features * self.out_features - 1}"
            )
        if not _is_ascending(cells):
            raise ValueError("cells are not ascending; allowed is each connection once, in order")

    def _set_cells(self, cells: Tensor) -> None:
        units = divided(cells, self.in_features)
        crow_indices = starts(self._counts(units))
        col_indices = cells.sub(units, alpha=self.in_features).int()
        del cells, units  # at a million neurons every list counts, where the caller keeps none
        self._set_indices(crow_indices, col_indices)

    def _renew_values(self, n: int) -> None:
        """Make the values zero, and their gradient none, if there are not as many as before."""
        if len(self.weight) != n:
            set_tensor_(self.weight, self.weight.new_zeros(n), None)

    def _set_indices(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        for name, indices in pattern_of(crow_indices, col_indices, self.in_features)._asdict().items():
            self._put(name, indices)

    def _put(self, name: str, indices: Tensor) -> None:
        """Set a buffer, in place where its size stays, so that who holds it (DDP) sees it."""
        old = getattr(self, name)
        if old.shape == indices.shape:
            old.copy_(indices)
        else:
            setattr(self, name, indices.to(self.weight.device))

    @torch.no_grad()
    def drop_(self, dead: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
        """Take some connections, bool ``(connection,)``, out of the layer and out of the optimizer's state.

        Examples:
            >>> layer = SparseLinear(100, 50, epsilon=2)
            >>> layer.drop_(layer.weight < 0)
            >>> bool((layer.weight >= 0).all())
            True
        """
        keep = cells_of(~dead)
        counts = self.crow_indices.diff() - torch.bincount(self.units[dead], minlength=self.out_features)
        replace_(self.weight, lambda old: old.index_select(0, keep), optimizers)
        self._set_indices(starts(counts), self.col_indices.index_select(0, keep))

    @torch.no_grad()
    def select_(
        self, units: Tensor | None = None, inputs: Tensor | None = None, optimizers: Iterable[Optimizer] = ()
    ) -> None:
        """Keep some units and inputs only, int64 ascending (None: all), and number them anew; the bias is left to you.

        Examples:
            >>> layer = SparseLinear(100, 50, epsilon=2, bias=False)
            >>> layer.select_(units=torch.arange(20))
            >>> layer.out_features
            20
        """
        device = self.weight.device
        rows, columns = renumbered(self.out_features, units, device), renumbered(self.in_features, inputs, device)
        self.drop_((rows[self.units] < 0) | (columns[self.col_indices] < 0), optimizers)
        counts = self.crow_indices.diff()[rows >= 0]
        self.set_pattern_(len(counts), count_true(columns >= 0), starts(counts), columns[self.col_indices].int())

    @torch.no_grad()
    def spread_(self, units: Tensor, inputs: Tensor, out_features: int, in_features: int) -> None:
        """Undo ``select_``: put the units and inputs at their old places, int64 ascending; the bias is left to you.

        Examples:
            >>> layer = SparseLinear(100, 50, epsilon=2, bias=False)
            >>> layer.select_(units=torch.arange(20))
            >>> layer.spread_(torch.arange(20), torch.arange(100), 50, 100)
            >>> layer.out_features
            50
        """
        self.set_pattern_(
            out_features, in_features, *spread(self.crow_indices, self.col_indices, units, inputs, out_features)
        )

    def set_pattern_(self, out_features: int, in_features: int, crow_indices: Tensor, col_indices: Tensor) -> None:
        """Set the widths and which connections there are, unchecked; the values and the bias are left to you."""
        self.out_features, self.in_features = out_features, in_features
        self.shape.copy_(torch.tensor([out_features, in_features]))
        self._set_indices(crow_indices, col_indices)

    @torch.no_grad()
    def rewire_(self, dying: Tensor, cells: Tensor, values: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
        """Put other connections in the place of as many; their moments are zero, those of all others go with them.

        Args:
            dying: Which go, as ascending places in ``weight``, int64 ``(n,)``.
            cells: Which come, ascending, int64 ``(n,)``; none of them stays anyway.
            values: Their values, ``(n,)``.
            optimizers: Where the moments are.

        Raises:
            ValueError: If not as many come as go, or what comes or goes is not ascending, or beyond the layer, or one that
                comes is there.
        """
        if len(dying) != len(cells):
            raise ValueError(f"cells has {len(cells)} connections; allowed is as many as die, {len(dying)}")
        self._check_cells(cells)
        n = len(self.weight)
        if len(dying) and not (int(dying[0]) >= 0 and int(dying[-1]) < n and _is_ascending(dying)):
            raise ValueError(f"dying is {dying}; allowed are places from 0 to {n - 1}, ascending")
        staying = others(n, dying)
        self.exchange_(Exchange(dying, staying, cells, self._places(staying, cells), values), optimizers)

    @torch.no_grad()
    def exchange_(self, exchange: Exchange, optimizers: Iterable[Optimizer] = ()) -> None:
        """Do what ``rewire_`` does where it is known, and not checked, that all is right."""
        self._set_indices(*self._merge(exchange, optimizers))

    def _merge(self, exchange: Exchange, optimizers: Iterable[Optimizer]) -> tuple[Tensor, Tensor]:
        """Put values and moments where they will be; return ``crow_indices`` and ``col_indices``.

        What it lists meanwhile is freed when it returns.
        """
        dying, staying, cells, places, values = exchange
        places_of_staying = others(len(self.weight), places)

        def merged(old: Tensor, born: Tensor) -> Tensor:
            new = torch.empty_like(old).scatter_(0, places_of_staying, old.index_select(0, staying))
            return new.scatter_(0, places, born.to(old))

        zeros = self.weight.new_zeros(len(cells))
        gradient = [] if self.weight.grad is None else [self.weight.grad]
        self.weight.copy_(merged(self.weight.detach(), values))
        for tensor in [*gradient, *(value for it in optimizers for _, value in moments_of(it, self.weight))]:
            tensor.copy_(merged(tensor, zeros))
        units = divided(cells, self.in_features)
        counts = self.crow_indices.diff()
        counts += self._counts(units) - self._counts(self.units.index_select(0, dying))
        return starts(counts), merged(self.col_indices, cells.sub(units, alpha=self.in_features))

    def _counts(self, units: Tensor) -> Tensor:
        return torch.bincount(units, minlength=self.out_features)

    def _places(self, staying: Tensor, cells: Tensor) -> Tensor:
        """Find where cells will be among those that stay; refuse one that does."""
        kept = self.cells.index_select(0, staying)
        n_before = n_up_to(kept, cells)
        last_before = torch.cat([kept.new_full((1,), -1), kept]).index_select(0, n_before)
        if bool((last_before == cells).any()):
            raise ValueError("cells: one of them is there already; allowed are others")
        return n_before.add_(torch.arange(len(cells), device=cells.device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values from ``N(0, 2 / mean fan-in)`` (He et al. 2015, Eq. 10); biases are zero."""
        fan_in = max(1.0, len(self.weight) / self.out_features)
        drawn = torch.randn(len(self.weight), generator=generator, dtype=torch.float64)
        self.weight.copy_(drawn.mul_(math.sqrt(2 / fan_in)))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(*, out_features)`` for ``(*, in_features)``."""
        return sparse_linear(input, self.weight, self.bias, self.pattern)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, connections={len(self.weight)}, "
            f"bias={self.bias is not None}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the file's pattern, however many connections it has."""
        found: dict[str, Tensor] = {
            name: state_dict[prefix + name]
            for name in ("weight", "shape", *INDICES)
            if isinstance(state_dict.get(prefix + name), Tensor)
        }
        if len(found) == 4:
            if why := self._refusal(**found):
                error_msgs.append(f"{prefix.removesuffix('.') or 'SparseLinear'}: {why}")
                return
            with torch.no_grad():
                self._set_indices(*(found[name].to(self.weight.device, torch.int32, copy=True) for name in INDICES))
                self._renew_values(len(found["weight"]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refusal(self, weight: Tensor, shape: Tensor, crow_indices: Tensor, col_indices: Tensor) -> str:
        """Say why a file's pattern cannot be this layer's, or nothing."""
        own = [self.out_features, self.in_features]
        if shape.tolist() != own:
            return f"the file's layer has (out_features, in_features) {shape.tolist()}; allowed is {own}"
        crow, col = crow_indices.long(), col_indices.long()
        n = len(col)
        ordered = (
            len(crow) == own[0] + 1 and int(crow[0]) == 0 and int(crow[-1]) == n and bool((crow.diff() >= 0).all())
        )
        firsts = torch.zeros(n + 1, dtype=torch.bool, device=col.device)
        firsts[crow.clamp(0, n)] = True
        ordered = ordered and bool(((col[1:] > col[:-1]) | firsts[1:n]).all())
        if not ordered or len(weight) != n or (n and not (int(col.min()) >= 0 and int(col.max()) < own[1])):
            return "the file's crow_indices, col_indices and weight do not fit together: the file is damaged"
        return ""


def _is_ascending(cells: Tensor) -> bool:
    return bool((cells[1:] > cells[:-1]).all())


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """Apply a sparse linear map to the last axis, ``(*, in_features)`` to ``(*, out_features)``.

    Args:
        x: The inputs, fastest where the batch is the fast axis (a transposed view).
        weight: The values of the connections, ``(connection,)``.
        bias: ``(out_features,)``, or None.
        pattern: The connections.

    Raises:
        ValueError: If the last axis has another length than there are inputs.
    """
    if has_torch_function((x, weight)):
        traced: Tensor = handle_torch_function(sparse_linear, (x, weight), x, weight, bias, pattern)
        return traced
    if x.shape[-1:] != (len(pattern.ccol_indices) - 1,):
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed is (*, {len(pattern.ccol_indices) - 1})")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    y = sparse_matmul(weight.to(dtype), rows.t().to(dtype).contiguous(), *pattern)  # (out_features, batch)
    if bias is not None:
        y = y + bias.to(dtype)[:, None]
    out: Tensor = y.t().to(weight.dtype)  # (batch, out_features), a view
    return out.reshape(*x.shape[:-1], len(pattern.crow_indices) - 1)


def spread(
    crow_indices: Tensor, col_indices: Tensor, units: Tensor, inputs: Tensor, out_features: int
) -> tuple[Tensor, Tensor]:
    """Return a pattern whose units and inputs have the places that they had in a larger layer, int64 ascending."""
    counts = crow_indices.new_zeros(out_features)
    counts[units.to(counts.device)] = crow_indices.diff()
    return starts(counts), inputs.to(col_indices)[col_indices]
