"""Sparse training for PyTorch Lightning: prune, rewire, rewind and explain any LightningModule."""

from lightning_cpna.activations import UnitActivity, Watch
from lightning_cpna.callbacks import (
    AlignmentLogger,
    CPNAPruning,
    DeadUnitLogger,
    NeuronPruning,
    SETRewiring,
    TicketRewind,
)
from lightning_cpna.certificate import Certificate, certify
from lightning_cpna.compact import Compacted, compact, load_compact
from lightning_cpna.cost import Cost, cost_of
from lightning_cpna.graph import Graph
from lightning_cpna.growth import Decay, Factors, Growth
from lightning_cpna.landscape import LayerUnits, UnitReport, plot_units, unit_report
from lightning_cpna.masks import Masks, infer_masks
from lightning_cpna.member_batches import member_loader
from lightning_cpna.observe import mean_replacement_penalties, observe
from lightning_cpna.plots import Connectivity, connectivity, plot_connectivity, plot_schedule, plot_tickets
from lightning_cpna.report import BudgetReport, LayerReport, SparsityReport
from lightning_cpna.rescale import rescale_
from lightning_cpna.rewiring import plant_, rewire_
from lightning_cpna.schedules import Annealing, Cubic, EpochFraction, Geometric, Linear, OneShot, Schedule
from lightning_cpna.scores import Score, ScoreInputs
from lightning_cpna.search import Found, Restarts, find_features
from lightning_cpna.selection import keep_top
from lightning_cpna.snapshot import Rewind, Snapshot, restore_masks_, rewind_, take_snapshot
from lightning_cpna.sparse import SparseLinear
from lightning_cpna.sparsity import Budget, Sparsity, sparsity_of
from lightning_cpna.stacked import member, stack
from lightning_cpna.targets import Axes, Target
from lightning_cpna.taylor import weight_saliencies
from lightning_cpna.tickets import Round, RoundReport, shuffle_masks_
from lightning_cpna.tracing import trace
from lightning_cpna.unit_scores import UnitInputs, UnitScore

__version__ = "0.1.0"

__all__ = [
    "AlignmentLogger",
    "Annealing",
    "Axes",
    "Budget",
    "BudgetReport",
    "CPNAPruning",
    "Certificate",
    "Compacted",
    "Connectivity",
    "Cost",
    "Cubic",
    "DeadUnitLogger",
    "Decay",
    "EpochFraction",
    "Factors",
    "Found",
    "Geometric",
    "Graph",
    "Growth",
    "LayerReport",
    "LayerUnits",
    "Linear",
    "Masks",
    "NeuronPruning",
    "OneShot",
    "Restarts",
    "Rewind",
    "Round",
    "RoundReport",
    "SETRewiring",
    "Schedule",
    "Score",
    "ScoreInputs",
    "Snapshot",
    "SparseLinear",
    "Sparsity",
    "SparsityReport",
    "Target",
    "TicketRewind",
    "UnitActivity",
    "UnitInputs",
    "UnitReport",
    "UnitScore",
    "Watch",
    "certify",
    "compact",
    "connectivity",
    "cost_of",
    "find_features",
    "infer_masks",
    "keep_top",
    "load_compact",
    "mean_replacement_penalties",
    "member",
    "member_loader",
    "observe",
    "plant_",
    "plot_connectivity",
    "plot_schedule",
    "plot_tickets",
    "plot_units",
    "rescale_",
    "restore_masks_",
    "rewind_",
    "rewire_",
    "shuffle_masks_",
    "sparsity_of",
    "stack",
    "take_snapshot",
    "trace",
    "unit_report",
    "weight_saliencies",
]
