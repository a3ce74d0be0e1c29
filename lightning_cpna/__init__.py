"""Sparse training for PyTorch Lightning: prune, rewire, rewind and explain any LightningModule."""

from lightning_cpna.callbacks import CPNAPruning
from lightning_cpna.graph import Graph
from lightning_cpna.masks import Masks, infer_masks, keep_top
from lightning_cpna.plots import Connectivity, connectivity, plot_connectivity, plot_schedule
from lightning_cpna.report import LayerReport, SparsityReport
from lightning_cpna.rescale import rescale_
from lightning_cpna.schedules import Annealing, Cubic, Geometric, Linear, OneShot, Schedule
from lightning_cpna.scores import Score, ScoreInputs
from lightning_cpna.sparsity import Budget, Sparsity, sparsity_of
from lightning_cpna.targets import Axes, Target
from lightning_cpna.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "Axes",
    "Budget",
    "CPNAPruning",
    "Connectivity",
    "Cubic",
    "Geometric",
    "Graph",
    "LayerReport",
    "Linear",
    "Masks",
    "OneShot",
    "Schedule",
    "Score",
    "ScoreInputs",
    "Sparsity",
    "SparsityReport",
    "Target",
    "connectivity",
    "infer_masks",
    "keep_top",
    "plot_connectivity",
    "plot_schedule",
    "rescale_",
    "sparsity_of",
    "trace",
]
