"""Searches for features in the examples: against data whose features are known, hand-made rows, and the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from examples.features import asu, noise
from examples.page import fill
from examples.results import Row
from examples.xor import frontier
from examples.xor.recipes import callbacks
from lightning_cpna import Restarts
from lightning_cpna.sweeps import load_rows
from tests.helpers import needs

ROOT = Path(__file__).parents[1]
MODULES: dict[str, tuple[Any, str]] = {
    "examples.xor.frontier": (frontier, "xor"),
    "examples.features.noise": (noise, "features"),
    "examples.features.asu": (asu, "features"),
}


def test_restarts_find_the_features_and_the_tail_prunes_to_the_counts_of_table_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Restarts(8, 8, pretraining=10, annealing=20, batch_size=128)
    monkeypatch.setitem(frontier.RESTARTS, 3, {10: plan})
    monkeypatch.setattr(frontier, "N", 1000)
    reached: list[float] = []

    def watched(*args: Any) -> list[Any]:
        pruning = callbacks(*args)
        reached.extend(next(iter(callback.targets.values())) for callback in pruning)
        return pruning

    monkeypatch.setattr(frontier, "callbacks", watched)
    row = frontier.restarts(k=3, p=10, data_seed=7)
    assert row["found"]
    assert row["certified"]
    assert row["test_auc"] > 95
    assert reached == [12, 24], "hidden and input connections; no features are annealed again"


def frontier_row(method: str, seed: int, *, solved: bool, auc: float, **further: Any) -> Row:
    return {"k": 3, "p": 60, "data_seed": seed, "method": method, "solved": solved, "test_auc": auc, **further}


def test_the_frontiers_tables_from_rows_made_by_hand() -> None:
    search = {"found": True, "certified": True, "tries": 8, "search_seconds": 5.0}
    failed = search | {"found": False, "tries": 16, "search_seconds": 8.0}
    rows = [
        frontier_row("restarts", 1, solved=True, auc=99.0, **search),
        frontier_row("restarts", 2, solved=False, auc=80.0, **failed),
        frontier_row("cpna_all", 1, solved=False, auc=50.0, tries=1),
        frontier_row("fsa_cpna", 1, solved=True, auc=99.0, tries=1),
        frontier_row("fsa_cpna", 2, solved=True, auc=99.0, tries=3),
        frontier_row("fsa_cpna", 3, solved=False, auc=50.0, tries=1),
    ]
    lines = frontier.table(rows).splitlines()
    assert lines[2] == "| 3-D p=60 | 2 | 1 of 2 | 2 of 2 | 12.0 (16) | 6.5 (8) | 89.50 ± 13.44 (80.00) |"
    assert lines[-1] == "| 3-D p=60 | 0 of 1 | 2 of 3 (1 at once) | 1 of 2 |"


def test_columns_that_correlate_with_another_are_those_of_a_brute_force() -> None:
    x = torch.randn(200, 6)
    x[:, 4] = -x[:, 1] + 0.1 * torch.randn(200)
    assert asu.twins(x) == [1, 4]


def test_the_table_of_noise_from_rows_made_by_hand() -> None:
    rows = [
        {"problem": problem, "certified": p_value < 2e-4, "p_value": p_value, "level": 2e-4}
        for problem in noise.PROBLEMS
        for p_value in (0.5, 1e-4)
    ]
    assert noise.table(rows).splitlines()[2].endswith("| 2 | 16 | 4 | 1 | 0.0001 | 0.0002 |")


def test_a_search_among_shuffled_labels_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("Lung-discrete")
    quick = Restarts(4, together=4, pretraining=2, annealing=6, refit=1, batch_size=16)
    monkeypatch.setitem(noise.PROBLEMS, "asu", noise.PROBLEMS["asu"]._replace(plan=quick))
    row = noise.search(problem="asu", seed=1, folder=None)
    assert not row["certified"]
    assert row["p_value"] > row["level"]


@pytest.mark.parametrize("name", MODULES)
def test_the_page_has_the_table_of_the_committed_results(name: str) -> None:
    module, folder = MODULES[name]
    rows = load_rows(ROOT / "examples" / folder / "results" / f"{name.split('.')[-1]}.csv")
    page = (ROOT / "RESULTS.md").read_text()
    assert fill(page, name, module.table(rows)) == page
    assert module.draw(rows).axes
