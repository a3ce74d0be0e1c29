"""The Hessian of a loss: its spectrum, its largest eigenvalues, its trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from lightning_cpna.landscape.surface import LossSurface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_EXACT = 5000  # chosen: a Hessian of 5000 coordinates takes 0.2 GB in float64, and about a minute on one core
BULK = 1e-3  # of the largest eigenvalue, as in Sagun et al.
MAX_OUTLIERS = 16  # chosen: the largest gap is looked for among so many eigenvalues


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a Hessian, as a measure: masses at places on the axis of eigenvalues.

    Attributes:
        nodes: The places, ``(probe, node)``; those of the exact spectrum are the eigenvalues, ``(1, n)``.
        weights: The masses, of the same shape; they sum to 1 in each row.
        n: The number of coordinates, and so of eigenvalues.
        loss: The loss at the point.
        is_exact: Whether the nodes are all eigenvalues; if not, they are those of Lanczos quadrature.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    loss: float
    is_exact: bool

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return float(self.nodes.max())

    @property
    def lambda_min(self) -> float:
        """The smallest eigenvalue."""
        return float(self.nodes.min())

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(self._traces().mean())

    @property
    def trace_error(self) -> float:
        """The standard error of the trace: 0 if it is exact, NaN if there is a single probe."""
        if self.is_exact:
            return 0.0
        if len(self.nodes) == 1:
            return math.nan
        return float(self._traces().std() / math.sqrt(len(self.nodes)))

    def share_below(self, size: float) -> float:
        """Return the share of eigenvalues whose magnitude is below a size."""
        return float((self.weights * (self.nodes.abs() < size)).sum(1).mean())

    @property
    def bulk_share(self) -> float:
        """The share of eigenvalues whose magnitude is below a thousandth of the largest one."""
        return self.share_below(BULK * self.lambda_max) if self.lambda_max > 0 else 1.0

    def density(self, places: Tensor, sigma: float) -> Tensor:
        """Return the density at some places, smoothed by a Gaussian.

        Args:
            places: ``(m,)``.
            sigma: The Gaussian's standard deviation.

        Returns:
            The density, ``(m,)``; its integral is 1.

        Raises:
            ValueError: If sigma is not positive.
        """
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}; allowed is a float > 0")
        z = (places.double() - self.nodes.reshape(-1, 1)) / sigma  # (node, m)
        bells = torch.exp(-z.square() / 2) / (sigma * math.sqrt(2 * math.pi))
        return (self.weights.reshape(-1, 1) * bells).sum(0) / len(self.nodes)

    def distance(self, other: Spectrum) -> float:
        """Return the Wasserstein-1 distance to another spectrum: how far mass must be moved, on average."""
        places, order = torch.cat([self.nodes.flatten(), other.nodes.flatten()]).sort()
        masses = torch.cat([self.weights.flatten() / len(self.nodes), -other.weights.flatten() / len(other.nodes)])
        return float((masses[order].cumsum(0)[:-1].abs() * places.diff()).sum())

    def _traces(self) -> Tensor:
        return self.n * (self.weights * self.nodes).sum(1)  # (probe,)


def hessian_spectrum(
    surface: LossSurface,
    point: Tensor | None = None,
    *,
    steps: int = 80,
    probes: int = 10,
    seed: int = 0,
    exact: bool = False,
) -> Spectrum:
    """Compute the spectrum of the Hessian of the mean loss at a point, by stochastic Lanczos quadrature.

    Each probe is a random sign vector, from which so many Lanczos steps are made, with full reorthogonalisation; the
    eigenvalues of the tridiagonal matrix are the nodes, the squares of the first entries of its eigenvectors their masses.
    The largest eigenvalues are found to rounding, and the measure to about a thousandth of its range. The trace is the weak
    one: its error falls as the root of the number of probes only, and is given beside it. It takes the memory of
    ``hessian_product``, and of ``steps`` vectors of the weights.

    Args:
        surface: The loss. Only its coordinates count: of a sparse network the live weights, or those of one layer.
        point: ``(n,)``; None: the module's own weights.
        steps: Lanczos steps a probe; 20 are enough for the largest eigenvalue, 40 for the smallest.
        probes: Random vectors.
        seed: Of the vectors.
        exact: Whether all eigenvalues are computed instead, for at most 5000 coordinates.

    Returns:
        The spectrum, in float64 on the CPU.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Papyan: Traces of class/cross-class structure pervade deep learning spectra (2020), Algorithm 2; Sagun, Evci, Güney,
        Dauphin, Bottou: Empirical analysis of the Hessian of over-parametrized neural networks (2017).

    Examples:
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> surface = LossSurface(net, [x], lambda net, x: net(x).square().sum() / 2)
        >>> hessian_spectrum(surface, exact=True).nodes
        tensor([[1., 4., 9.]], dtype=torch.float64)
    """
    for name, value in (("steps", steps), ("probes", probes)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; allowed is an int >= 1")
    point = surface.point() if point is None else point
    loss = surface.loss(point)
    if exact:
        values = torch.linalg.eigvalsh(hessian(surface, point).double().cpu())
        return Spectrum(values[None], torch.full_like(values, 1 / surface.n)[None], surface.n, loss, True)
    product, steps = surface.hessian_product(point), min(steps, surface.n)
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(probes):
        probe = (torch.randint(0, 2, (surface.n,), generator=generator) * 2 - 1).to(point)
        diagonal, off = lanczos(product, probe, steps)
        values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        missing = steps - len(values)  # an invariant subspace may be smaller than the steps
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([vectors[0].square(), values.new_zeros(missing)]))
    return Spectrum(torch.stack(nodes), torch.stack(weights), surface.n, loss, False)


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Make Lanczos steps with a symmetric matrix, orthogonalising each new vector against all before it, twice.

    Args:
        product: Multiplies a vector ``(n,)`` by the matrix.
        start: The first vector, ``(n,)``, of any length but 0.
        steps: How many; fewer are made if the vectors span an invariant subspace.

    Returns:
        The diagonal of the tridiagonal matrix, float64 ``(m,)``, and its off-diagonal, ``(m - 1,)``, on the CPU.

    Examples:
        >>> lanczos(lambda v: 2 * v, torch.tensor([3.0, 4.0]), 2)
        (tensor([2.], dtype=torch.float64), tensor([], dtype=torch.float64))
    """
    basis = start.new_zeros(steps, len(start))  # (step, n)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    off: list[float] = []
    for i in range(steps):
        new = product(basis[i])
        diagonal.append(float(new @ basis[i]))
        if i == steps - 1:
            break
        size = float(new.norm())
        known = basis[: i + 1]
        for _ in range(2):
            new = new - known.T @ (known @ new)
        length = float(new.norm())
        if length <= torch.finfo(start.dtype).eps * len(start) ** 0.5 * size:
            break
        basis[i + 1] = new / length
        off.append(length)
    return torch.tensor(diagonal, dtype=torch.float64), torch.tensor(off, dtype=torch.float64)


def hessian(surface: LossSurface, point: Tensor | None = None) -> Tensor:
    """Compute the whole Hessian at a point, ``(n, n)``, a column at a time.

    Args:
        surface: The loss, of at most 5000 coordinates.
        point: ``(n,)``; None: the module's own weights.

    Raises:
        ValueError: If there are more.

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> hessian(LossSurface(net, [x], lambda net, x: net(x).square().sum() / 2))
        tensor([[1., 2.],
                [2., 4.]])
    """
    if surface.n > MAX_EXACT:
        raise ValueError(
            f"surface has {surface.n} coordinates; allowed for the whole Hessian are {MAX_EXACT}: take fewer (names), or "
            "Lanczos quadrature (exact=False)"
        )
    point = surface.point() if point is None else point
    product = surface.hessian_product(point)
    found = torch.stack([product(row) for row in torch.eye(surface.n, dtype=point.dtype, device=point.device)])
    return (found + found.T) / 2


def top_eigenvalues(
    surface: LossSurface, point: Tensor | None = None, k: int = MAX_OUTLIERS + 1, *, seed: int = 0
) -> Tensor:
    """Compute the largest eigenvalues of the Hessian at a point, by scipy's implicitly restarted Lanczos method.

    Args:
        surface: The loss.
        point: ``(n,)``; None: the module's own weights.
        k: How many, fewer than there are coordinates.
        seed: Of the first vector.

    Returns:
        The eigenvalues, the largest first, float64 ``(k,)``.

    Raises:
        ValueError: If k is out of range.
        scipy.sparse.linalg.ArpackNoConvergence: If they are not found in ten steps a coordinate.

    Examples:
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> surface = LossSurface(net.double(), [x], lambda net, x: net(x).square().sum() / 2)
        >>> top_eigenvalues(surface, k=2).round(decimals=6)
        tensor([9., 4.], dtype=torch.float64)
    """
    if type(k) is not int or not 1 <= k < surface.n:
        raise ValueError(f"k is {k!r}; allowed is an int from 1 to {surface.n - 1}")
    point = surface.point() if point is None else point
    product = surface.hessian_product(point)
    start = torch.randn(surface.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    matrix = LinearOperator(
        (surface.n, surface.n),
        matvec=lambda v: product(torch.from_numpy(v.reshape(-1)).to(point)).double().cpu().numpy(),
        dtype=start.dtype,
    )
    tolerance = 0.0 if point.dtype == torch.float64 else torch.finfo(torch.float32).eps
    found = eigsh(matrix, k=k, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return torch.from_numpy(found).sort(descending=True).values


def n_outliers(eigenvalues: Tensor) -> int:
    """Count the eigenvalues that stand out: those before the largest ratio of one to the next.

    Args:
        eigenvalues: The largest ones, the largest first; the first 17 are looked at. What is below rounding, or negative,
            counts as rounding.

    Raises:
        ValueError: If there are fewer than two, or they are not in descending order.

    Reference:
        Sagun et al. (2017), Section 3, where they are counted by eye.

    Examples:
        >>> n_outliers(torch.tensor([9.0, 5.0, 0.2, 0.1, 0.05]))
        2
    """
    top = eigenvalues[: MAX_OUTLIERS + 1].double()
    if len(top) < 2 or bool((top.diff() > 0).any()):
        raise ValueError(f"eigenvalues is {eigenvalues.tolist()}; allowed are two or more, the largest first")
    if not top[0] > 0:
        return 0
    top = top.clamp(min=torch.finfo(eigenvalues.dtype).eps * float(top[0]))
    return int((top[:-1] / top[1:]).argmax()) + 1


def plot_spectrum(spectrum: Spectrum, outliers: Tensor | None = None) -> Figure:
    """Draw the density of eigenvalues on a logarithmic scale, and mark the largest ones.

    Args:
        spectrum: From ``hessian_spectrum``.
        outliers: Eigenvalues to mark, ``(k,)``.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = spectrum.lambda_min, spectrum.lambda_max
    width = (high - low) or 1.0
    places = torch.linspace(low - 0.05 * width, high + 0.05 * width, 1000, dtype=torch.float64)
    axes.semilogy(places, spectrum.n * spectrum.density(places, 0.01 * width) * 0.01 * width, color="C0")
    if outliers is not None:
        heights = torch.full_like(outliers, 0.5)
        axes.plot(outliers, heights, "v", color="C3", label=f"the {len(outliers)} largest")
        axes.legend()
    how = "exact" if spectrum.is_exact else f"{len(spectrum.nodes)} probes"
    axes.set(xlabel="eigenvalue", ylabel="eigenvalues in a hundredth of the range", ylim=(0.1, 2 * spectrum.n))
    axes.set_title(f"Hessian of {spectrum.n:,} weights, loss {spectrum.loss:.3g} ({how})")
    axes.grid(alpha=0.3)
    return figure
