"""The callbacks."""

from lightning_cpna.callbacks.cpna import CPNAPruning
from lightning_cpna.callbacks.monitors import DeadUnitLogger
from lightning_cpna.callbacks.neurons import NeuronPruning
from lightning_cpna.callbacks.rewiring import SETRewiring
from lightning_cpna.callbacks.tickets import TicketRewind

__all__ = ["CPNAPruning", "DeadUnitLogger", "NeuronPruning", "SETRewiring", "TicketRewind"]
