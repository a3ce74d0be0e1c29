"""Trainers that say nothing: what an example prints is its result."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger


def quiet_trainer(*, logger: Logger | bool = False, **options: Any) -> pl.Trainer:
    """Make a Trainer that prints errors only, and saves nothing.

    Args:
        logger: Where values go; without one none are collected, which takes longer than a small network's step.
        options: Of the Trainer.
    """
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    if not logger:
        options["log_every_n_steps"] = 0
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(logger=logger, **quiet, **options)
