"""What TensorBoard and its kin get beside numbers: the plan as text, and pictures of the connectivity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_cpna.plots import connectivity, log_figure, plot_connectivity, that_take
from lightning_cpna.sparsity import Sparsity

REST = 0.25  # chosen: a picture whenever so much of a layer's connections in the last one is left, three to six a layer
# Chosen: up to here a picture takes a few seconds.
MAX_CONNECTIONS, MAX_UNITS, MAX_LAYERS = 5_000_000, 200_000, 12


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan.

    Attributes:
        what: What is pruned or rewired.
        kind: What is counted: connections, features or units.
        n: How many there are.
        n_end: How many should remain.
        when: When, and by which schedule.
    """

    what: str
    kind: str
    n: int
    n_end: int
    when: str


def plan_text(rows: Iterable[PlanRow]) -> str:
    """Write a plan as a table in Markdown.

    Examples:
        >>> print(plan_text([PlanRow("net.2.weight", "connection", 1024, 16, "Linear(start=10, end=90, every=1)")]))
        | what | from | to | when |
        | --- | ---: | ---: | --- |
        | `net.2.weight` | 1,024 connections | 16 | Linear(start=10, end=90, every=1) |
    """
    lines = ["| what | from | to | when |", "| --- | ---: | ---: | --- |"]
    for row in rows:
        when = row.when.replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| `{row.what}` | {row.n:,} {row.kind}s | {row.n_end:,} | {when} |")
    return "\n".join(lines)


def log_text(loggers: Iterable[Any], tag: str, text: str, step: int) -> None:
    """Give a text to every logger that takes texts (TensorBoard and its kin)."""
    for add_text in that_take("add_text", loggers):
        add_text(tag, text, global_step=step)


class ConnectivityPictures:
    """Draws the connectivity when there is something new to see.

    Args:
        tag: What the pictures are called.
    """

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self._drawn = dict[str, int]()  # what lived in the last picture
        self._drawn_at = -1

    def draw(self, loggers: Iterable[Any], sparsity: Sparsity, step: int, *, last: bool = False) -> None:
        """Draw, if this is the first time, or the last, or three quarters of a layer's in the last picture have gone.

        A network of more than five million live connections, 200,000 units and features, or twelve layers is not drawn.
        """
        live, layers = sparsity.live_counts(), list((sparsity.graph or {}).values())
        n_units = sum(len(layer.units) for layer in layers) + max((len(layer.sources) for layer in layers), default=0)
        if sum(live.values()) > MAX_CONNECTIONS or n_units > MAX_UNITS or len(layers) > MAX_LAYERS:
            return
        before = live | self._drawn
        has_shrunk = any(n < before[name] and n <= REST * before[name] for name, n in live.items())
        is_news = (live, step) != (self._drawn, self._drawn_at) if last else has_shrunk or not self._drawn
        if is_news:
            self._drawn, self._drawn_at = live, step
            log_figure(loggers, self.tag, partial(_picture, sparsity), step)


def _picture(sparsity: Sparsity) -> Any:
    return plot_connectivity(connectivity(sparsity))
