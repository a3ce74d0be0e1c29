"""The callbacks."""

from lightning_cpna.callbacks.cpna import CPNAPruning
from lightning_cpna.callbacks.monitors import DeadUnitLogger
from lightning_cpna.callbacks.neurons import NeuronPruning

__all__ = ["CPNAPruning", "DeadUnitLogger", "NeuronPruning"]
