"""The numbers that loggers, the progress bar and monitors get, on the trainer's own axis of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_cpna._lightning import LightningModule, Trainer


class Log:
    """What one callback logs in one fit.

    Args:
        trainer: The trainer.
        name: Prefix of every number's name.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer = trainer
        self._name = name
        self._at_target: bool | None = None
        self._shown: dict[str, float] = {}
        self._given: dict[str, tuple[int, float]] = {}

    def is_due(self, at_target: bool) -> bool:
        """Tell whether numbers are wanted after this batch, which ended with an optimizer step, or are news."""
        is_news, self._at_target = at_target != self._at_target, at_target
        every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        n_steps = self._trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return is_news or (every > 0 and n_steps % every == 0)

    def show(self, pl_module: LightningModule, values: Mapping[str, float], **how: Any) -> None:
        """Give numbers that are new to the progress bar (the connections) and to callbacks that monitor them.

        Both keep what they were given, and Lightning's log takes about a millisecond a number. The loggers are not left to
        Lightning: where a run is stopped it gives them what was logged last, however old.
        """
        news = {key: value for key, value in self._named(values).items() if self._shown.get(key) != value}
        self._shown |= news
        connections = f"{self._name}/connections"
        if connections in news:
            pl_module.log(connections, news.pop(connections), prog_bar=True, logger=False, **how)
        if news:
            pl_module.log_dict(news, logger=False, **how)

    def give(self, values: Mapping[str, float], step: int) -> None:
        """Give the loggers numbers that they do not have yet."""
        named = self._named(values)
        news = {key: value for key, value in named.items() if self._given.get(key) != (step, value)}
        give_loggers(self._trainer, news, step)
        self._given |= {key: (step, value) for key, value in news.items()}

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{self._name}/{key}": float(value) for key, value in values.items()}


def last_step(trainer: Trainer) -> int:
    """Return where loggers put the batch that has ended: they count those with an optimizer step, from 0."""
    n: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return n if trainer.validating else n - 1  # which rises after the validation


def give_loggers(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Give the loggers values at a step, counted as in ``last_step``."""
    if trainer.log_every_n_steps and values and step >= 0:  # type: ignore[attr-defined]
        epochs: Any = trainer.fit_loop.epoch_progress.current
        epoch = max(0, epochs.started - 1)  # where an epoch has ended, current_epoch is the next one
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": epoch}, step=step)
