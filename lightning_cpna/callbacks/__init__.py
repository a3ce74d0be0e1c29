"""The callbacks."""

from lightning_cpna.callbacks.cpna import CPNAPruning
from lightning_cpna.callbacks.monitors import AlignmentLogger, DeadUnitLogger
from lightning_cpna.callbacks.neurons import NeuronPruning
from lightning_cpna.callbacks.rewiring import SETRewiring
from lightning_cpna.callbacks.tickets import TicketRewind

__all__ = ["AlignmentLogger", "CPNAPruning", "DeadUnitLogger", "NeuronPruning", "SETRewiring", "TicketRewind"]
