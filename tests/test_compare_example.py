"""The comparison: every method on blobs, its measures against scikit-learn, and its table against hand-made rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'compare' is not installed")
pytest.importorskip("xgboost", reason="the extra 'compare' is not installed")
pytest.importorskip("lassonet", reason="the extra 'compare' is not installed")

from sklearn.metrics import accuracy_score, roc_auc_score

from examples.compare import __main__ as compare
from examples.compare import networks
from examples.compare.methods import Fitted
from examples.compare.problems import held_out, load
from examples.data import Split
from examples.page import fill
from lightning_cpna.sweeps import load_rows

SMALL = {
    "steps": 200, "hidden": 16, "width": 40, "units": 4, "inputs": 4, "batch_size": 32, "features": 4, "tries": 2, "most": 4,
    "max_iter": 100, "n_estimators": 20, "lr": 1e-2,
}  # fmt: skip


def blobs(n: int = 120) -> Split:
    """Three classes that differ in the first three of ten features."""
    y = torch.arange(n) % 3
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(2))
    x[:, :3] += 4 * torch.nn.functional.one_hot(y, 3)
    return Split(x, y)


@pytest.mark.parametrize(
    "method", [pytest.param(it, marks=pytest.mark.slow) if it == "LassoNet" else it for it in compare.METHODS]
)
def test_every_method_learns_blobs_and_says_what_it_reads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space, fit = compare.METHODS[method]
    settings = {name: SMALL.get(name, values[0]) for name, values in space.items()}
    settings |= {"C": 1.0} if "C" in space else {}
    monkeypatch.setattr(networks, "TAIL", 300)
    fitted = fit(settings, blobs(), 3, 0)
    scores = fitted.scores(blobs(60).x)
    assert scores.shape == (60, 3)
    assert compare.measure(fitted, blobs(60)) > 80
    assert set(fitted.features) <= set(range(10))
    assert len(set(fitted.features) & {0, 1, 2}) >= 2
    assert fitted.parameters > 0
    unread = blobs(60).x
    unread[:, [column for column in range(10) if column not in fitted.features]] = 100.0
    torch.testing.assert_close(fitted.scores(unread), scores)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_measures_are_those_of_scikit_learn(n_classes: int) -> None:
    scores, y = torch.rand(50, n_classes, dtype=torch.float64), torch.arange(50) % n_classes
    fitted = Fitted(lambda x: scores, [0], 1)
    found = compare.measure(fitted, Split(torch.zeros(50, 1), y))
    expected = roc_auc_score(y, scores[:, 1] - scores[:, 0]) if n_classes == 2 else accuracy_score(y, scores.argmax(1))
    assert found == pytest.approx(100 * expected, abs=1e-4)


def test_trials_are_the_same_for_all_problems_and_the_best_on_what_is_held_out_is_taken() -> None:
    for method in compare.METHODS:
        drawn = [compare.drawn(method, trial, 6) for trial in range(6)]
        assert len({json.dumps(one, sort_keys=True) for one in drawn}) == 6, "all methods have as many trials"
        for name, values in compare.METHODS[method].space.items():
            counts = Counter(json.dumps(one[name]) for one in drawn)
            assert set(counts) <= set(map(json.dumps, values))
            assert all(abs(counts[json.dumps(value)] - 6 / len(values)) < 1 for value in values), name
    rows = [
        {"problem": "a", "method": "m", "validation": value, "settings": settings}
        for value, settings in ((1.0, "x"), (5.0, "y"), (2.0, "z"), (1.0, "x"), (0.0, "y"), (4.0, "z"))
    ]
    assert compare.best(rows) == {("a", "m"): "z"}


def test_what_is_held_out_is_a_quarter_of_each_class_and_no_test_data() -> None:
    train, held = held_out(blobs(), 0)
    assert (len(train.y), len(held.y)) == (90, 30)
    assert torch.bincount(held.y).tolist() == [10, 10, 10]
    data = load("3-D XOR p=60", 1, None)
    assert data.relevant == frozenset({0, 1, 2})
    assert not (data.test.x[:, None, :3] == data.train.x[None, :, :3]).all(dim=2).any()


def test_the_tables_from_rows_made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "METHODS", {method: compare.METHODS[method] for method in ("XGBoost", "SET")})
    common = {"features": 4, "parameters": 1000, "fit_seconds": 2.0, "predict_seconds": 0.0015}
    rows = [
        {"problem": problem, "method": method, "test": test, **common, **known}
        for problem, known in (("a", {}), ("b", {"precision": 0.5, "recall": 1.0}))
        for method, tests in (("XGBoost", (90.0, 92.0)), ("SET", (80.0, 80.0)))
        for test in tests
    ]
    rows[-1] |= {"precision": 0.25, "recall": 0.5, "fit_seconds": 6.0}
    lines = compare.table(rows).splitlines()
    assert "| a | **91.0 ± 1.4** | 80.0 ± 0.0 |" in lines
    assert "| features: precision / recall | b |" in lines
    assert "| SET | 4: 0.38 / 0.75 (all in 1 of 2) |" in lines
    assert "| XGBoost | none / 1.0 | 2 | 4 | 1,000 | 2.0 (2) | 1.5 |" in lines
    assert "| SET | none / 2.0 | 0 | 4 | 1,000 | 3.0 (6) | 1.5 |" in lines


def test_the_page_shows_the_committed_results_of_settings_that_were_best_in_the_search() -> None:
    root = Path(__file__).parents[1]
    rows, searched = (
        load_rows(root / "examples" / "compare" / "results" / f"{name}.csv") for name in ("compare", "search")
    )
    page = (root / "RESULTS.md").read_text()
    assert fill(page, "examples.compare", compare.table(rows)) == page
    chosen = compare.best(searched)
    assert {(row["problem"], row["method"]): row["settings"] for row in rows} == chosen
    tried = Counter((row["problem"], row["method"]) for row in searched)
    assert set(tried.values()) == {compare.SIZES["reduced"].trials * compare.SIZES["reduced"].folds}
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    for n in (1, 2, len(problems)):
        drawn = compare.draw([row for row in rows if row["problem"] in problems[:n]]).axes
        assert [axes.get_title() for axes in drawn if axes.get_visible()] == problems[:n]
        assert all(axes.yaxis_inverted() for axes in drawn), "from above as in the table"


def test_a_repeat_counts_the_relevant_features(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = Fitted(lambda x: torch.rand(len(x), 2), [0, 1, 7, 9], 5)
    monkeypatch.setitem(compare.METHODS, "SET", compare.METHODS["SET"]._replace(fit=lambda *_: fitted))
    row = compare.repeat(problem="4-D XOR p=40", method="SET", seed=1, settings="{}", folder=Path())
    assert (row["precision"], row["recall"], row["features"], row["parameters"]) == (0.5, 0.5, 4, 5)
