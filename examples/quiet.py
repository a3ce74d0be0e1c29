"""Lightning's own messages, which say nothing about a run of an example."""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Let Lightning print errors only."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
