"""Do the weight vectors of a layer cluster? Angles to the clusters' centres, and how evenly the vectors are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cpna.sparse import SparseLinear
from lightning_cpna.targets import ListedAxes, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIMILAR = 0.37  # about exp(-1): chosen by Heitmann, pairs nearer than the mean distance are joined


@dataclass(frozen=True)
class Alignment:
    """How the weight vectors of a layer are aligned. Vectors that are zero have no direction, and are left out.

    Attributes:
        filters: The weight vectors, float64 ``(vector, input)``.
        units: Which unit of the layer each is, int64 ``(vector,)``.
        centres: The centres of the clusters, of length 1, ``(cluster, input)``.
        clusters: The cluster of each, int64 ``(vector,)``.
        angles: The angle of each to the centre of its cluster, in degrees, ``(vector,)``.
    """

    filters: Tensor
    units: Tensor
    centres: Tensor
    clusters: Tensor
    angles: Tensor

    @property
    def norms(self) -> Tensor:
        """The length of each vector, ``(vector,)``."""
        norms: Tensor = torch.linalg.vector_norm(self.filters, dim=1)
        return norms

    @property
    def sizes(self) -> Tensor:
        """How many vectors each cluster has, int64 ``(cluster,)``."""
        return self.clusters.bincount(minlength=len(self.centres))

    @property
    def frame_potential(self) -> float:
        """The frame potential of the vectors' directions; see ``frame_potential``."""
        return frame_potential(self.filters)

    @property
    def mean_inner_product(self) -> float:
        """The mean of the absolute inner products of all pairs of directions, each with itself among them."""
        directions = F.normalize(self.filters, dim=1)
        return float((directions @ directions.T).abs().mean())

    def angle(self, quantile: float = 0.5, *, by_norm: bool = False) -> float:
        """Return a quantile of the angles, in degrees.

        Args:
            quantile: In [0, 1].
            by_norm: Whether each vector counts by its length, as short ones often stay where they began.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; allowed is a float in [0, 1]")
        if not by_norm:
            return float(self.angles.quantile(quantile))
        angles, order = self.angles.sort()
        shares = self.norms[order].cumsum(0) / self.norms.sum()
        return float(angles[min(int((shares < quantile).sum()), len(angles) - 1)])

    def share_within(self, degrees: float, *, by_norm: bool = False) -> float:
        """Return the share of vectors whose angle is at most so many degrees; ``by_norm`` as in ``angle``."""
        within = self.angles <= degrees
        if not by_norm:
            return float(within.double().mean())
        return float(self.norms[within].sum() / self.norms.sum())


def filters_of(module: nn.Module, name: str) -> Tensor:
    """Return the weight vectors of a layer's units, float64 ``(unit, inputs)`` on the CPU; removed connections are zero.

    Args:
        module: The module.
        name: The weight, by name; of a convolution a unit's kernel is flattened, of a ``SparseLinear`` it is filled up.

    Raises:
        ValueError: If there is no such weight.

    Examples:
        >>> filters_of(nn.Conv2d(2, 5, 3), "weight").shape
        torch.Size([5, 18])
    """
    found = [target for group in resolve(module, [name]).values() for target in group]
    if len(found) != 1 or found[0].axes.input is None or found[0].axes.n_members(found[0].parameter) > 1:
        raise ValueError(
            f"name is {name!r}; allowed is the name of one weight, with units and inputs, of a single network"
        )
    target = found[0]
    if isinstance(target.axes, ListedAxes):
        layer: SparseLinear = target.axes.layer
        weight = layer.to_dense().weight.detach()
    else:
        weight = target.axes.view(target.parameter.detach())[0]
    return weight.double().cpu().flatten(1)


def alignment(filters: Tensor, n_clusters: int = 4, *, seed: int = 0) -> Alignment:
    """Cluster weight vectors by their direction, and measure how near each is to the centre of its cluster.

    Args:
        filters: The vectors, ``(vector, input)``, as ``filters_of`` returns them.
        n_clusters: How many clusters; in XORD one for each of the four patterns. There are fewer if there are fewer different
            directions.
        seed: Of k-means, of whose ten starts the best is taken.

    Raises:
        ValueError: If there are fewer vectors that are not zero than clusters, or one is not finite.
        ImportError: If scikit-learn is not installed.

    Reference:
        Brutzkus, Globerson: Why do larger models generalize better? A theoretical perspective via the XOR problem (2019),
        where the angles to the centres of four clusters show that filters cluster.

    Examples:
        >>> result = alignment(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), n_clusters=2)
        >>> result.angles, result.units
        (tensor([0., 0., 0.], dtype=torch.float64), tensor([0, 1, 2]))
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("alignment needs scikit-learn: pip install 'lightning-cpna[analysis]'") from error

    if filters.ndim != 2 or not bool(filters.isfinite().all()):
        raise ValueError(f"filters has shape {tuple(filters.shape)}; allowed are finite vectors, (vector, input)")
    filters = filters.detach().double().cpu()
    units = (filters != 0).any(1).nonzero().flatten()
    if type(n_clusters) is not int or not 1 <= n_clusters <= len(units):
        raise ValueError(
            f"n_clusters is {n_clusters!r}; allowed is an int from 1 to {len(units)}, the vectors that are not 0"
        )
    filters = filters[units]
    directions = F.normalize(filters, dim=1)
    n_distinct = len(torch.unique(directions.round(decimals=12), dim=0))
    means = KMeans(min(n_clusters, n_distinct), n_init=10, random_state=seed).fit(directions.numpy())
    clusters = torch.from_numpy(means.labels_).long()
    centres = F.normalize(torch.from_numpy(means.cluster_centers_), dim=1)
    return Alignment(filters, units, centres, clusters, angles_between(directions, centres[clusters]))


def angles_between(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles between pairs of vectors ``(pair, input)``, in degrees; exact for small ones, too.

    Examples:
        >>> angles_between(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([90.])
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    apart, together = ((a + sign * b).norm(dim=1) for sign in (-1, 1))
    degrees: Tensor = torch.rad2deg(2 * torch.atan2(apart, together))
    return degrees


def frame_potential(filters: Tensor, *, normalize: bool = True) -> float:
    """Return the frame potential of vectors: the mean of the squared inner products of all pairs.

    It is lowest where the vectors are spread evenly; but vectors in clusters at right angles are so, too, so that it says
    little without the angles beside it.

    Args:
        filters: ``(vector, input)``; those that are zero do not count.
        normalize: Whether only their directions count; the value is then from ``frame_potential_bounds`` to 1.

    Reference:
        Benedetto, Fickus: Finite normalized tight frames (2003), here divided by the square of the number of vectors.

    Examples:
        >>> frame_potential(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))  # 5 of 9 pairs
        0.5555555555555556
    """
    vectors = filters.double()[(filters != 0).any(1)]
    vectors = F.normalize(vectors, dim=1) if normalize else vectors
    return float((vectors @ vectors.T).square().mean())


def frame_potential_bounds(n: int, d: int) -> tuple[float, float]:
    """Return the lowest frame potential that n directions in d dimensions can have, and its mean for random ones.

    Examples:
        >>> frame_potential_bounds(4, 2)
        (0.5, 0.625)
    """
    return max(1 / n, 1 / d), 1 / n + (1 - 1 / n) / d


def similarity_graph(filters: Tensor, threshold: float = SIMILAR) -> Tensor:
    """Return how similar weight vectors are, as a weighted graph: ``exp(-(d / mean d)^2)`` with ``d = (1 - cos) / 2``.

    Args:
        filters: ``(vector, input)``; vectors that are zero are similar to nothing.
        threshold: Edges that weigh less are left out.

    Returns:
        The weights of the edges, float64 ``(vector, vector)``, symmetric, 0 on the diagonal.

    Reference:
        Heitmann: Neural network pruning (github.com/jheitmann/Neural-net-pruning, 2020), ``snapshots.py``; there the mean is
        over all epochs, and over each vector with itself, too.

    Examples:
        >>> similarity_graph(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]))
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 0.]], dtype=torch.float64)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; allowed is a float in [0, 1]")
    directions = F.normalize(filters.double(), dim=1)
    there = directions.norm(dim=1) > 0
    pairs = ~torch.eye(len(directions), dtype=torch.bool) & there & there[:, None]
    distances = (1 - directions @ directions.T).clamp(min=0) / 2
    mean = float(distances[pairs].mean()) if bool(pairs.any()) else 0.0
    same = mean <= torch.finfo(torch.float64).eps
    weights = torch.ones_like(distances) if same else torch.exp(-(distances / mean).square())
    found: Tensor = weights * pairs * (weights >= threshold)
    return found


def plot_alignment(after: Alignment, before: Alignment | None = None) -> Figure:
    """Draw the angles to the centres, and the vectors themselves in their two principal components.

    Args:
        after: Of the trained layer.
        before: Of the same layer at its initialisation.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    states = {"initialisation": before, "trained": after} if before else {"trained": after}
    figure = Figure(figsize=(4.5 * (len(states) + 1), 4), layout="constrained")
    first, *panels = figure.subplots(1, len(states) + 1)
    for (name, state), axes in zip(states.items(), panels, strict=True):
        colour = "C0" if state is after else "0.6"
        first.ecdf(state.angles, label=f"{name}: median {state.angle():.1f}°", color=colour)
        draw_vectors(axes, state)
        axes.set_title(f"{name}: frame potential {state.frame_potential:.3f}")
    low, random = frame_potential_bounds(len(after.filters), after.filters.shape[1])
    first.set(xlabel="angle to the centre of the cluster, degrees", ylabel="share of weight vectors at most so far")
    first.set_title(f"frame potential: lowest {low:.3f}, of random vectors {random:.3f}", fontsize=9)
    first.legend()
    first.grid(alpha=0.3)
    return figure


def draw_vectors(axes: Axes, state: Alignment) -> None:
    """Draw weight vectors as arrows in their plane, or that of their two principal axes, in the colours of the clusters."""
    vectors, shown = state.filters, ""
    if vectors.shape[1] > 2:
        _, values, rows = torch.linalg.svd(vectors, full_matrices=False)
        share = float(values[:2].square().sum() / values.square().sum())
        vectors, shown = vectors @ rows[:2].T, f", {share:.0%} of the squares"
    ends = vectors if vectors.shape[1] == 2 else F.pad(vectors, (0, 1))
    colours = [f"C{cluster % 10}" for cluster in state.clusters.tolist()]
    axes.quiver(
        *torch.zeros(2, len(ends)),
        ends[:, 0],
        ends[:, 1],
        angles="xy",
        scale_units="xy",
        scale=1,
        color=colours,
        width=0.004,
    )
    limit = 1.1 * float(ends.norm(dim=1).max())
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set(xlabel=f"{len(ends)} weight vectors{shown}")
    axes.grid(alpha=0.3)
