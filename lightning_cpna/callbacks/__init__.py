"""The callbacks."""

from lightning_cpna.callbacks.cpna import CPNAPruning

__all__ = ["CPNAPruning"]
