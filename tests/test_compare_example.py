"""The comparison: every method on blobs, its measures against scikit-learn, and its table against hand-made rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'compare' is not installed")
pytest.importorskip("xgboost", reason="the extra 'compare' is not installed")
pytest.importorskip("lassonet", reason="the extra 'compare' is not installed")

from sklearn.metrics import accuracy_score, roc_auc_score

from examples.compare import __main__ as compare
from examples.compare import methods, networks, problems
from examples.compare.methods import Description, Fitted
from examples.compare.problems import held_out, load
from examples.data import ASU, Split
from examples.page import fill
from lightning_cpna.sweeps import load_rows
from tests.helpers import needs, needs_uci

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
def test_every_method_learns_blobs_and_says_what_it_reads(method: str) -> None:
    space, fit, _ = compare.METHODS[method]
    settings = {name: SMALL.get(name, values[0]) for name, values in space.items()}
    settings |= {"times": 30.0} if "times" in space else {}
    fitted = fit(settings, blobs(), 3, 0)
    scores = fitted.scores(blobs(60).x)
    assert scores.shape == (60, 3)
    assert compare.measure(fitted, blobs(60)) > 80
    assert fitted.importances.shape == (10,)
    assert len(set(fitted.features) & {0, 1, 2}) >= 2
    assert len(set(fitted.top(3)) & {0, 1, 2}) >= 2
    assert fitted.parameters > 0
    unread = blobs(60).x
    unread[:, [column for column in range(10) if column not in fitted.features]] = 100.0
    torch.testing.assert_close(fitted.scores(unread), scores)


def test_a_hidden_layer_of_a_wide_table_has_few_weights_and_can_be_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "MOST_WEIGHTS", 65)
    settings = {name: SMALL.get(name, values[0]) for name, values in networks.CPNA.items()}
    dense = networks.dense(settings | {"dropout": 0.0}, blobs(), 3, 0)
    assert dense.parameters == 6 * (10 + 1 + 3) + 3
    fitted = networks.cpna(settings | {"hidden": 16}, blobs(), 3, 0)  # four times its units would be more than six
    assert 0 < fitted.parameters <= 4 * 4 + 6 + 4 * 3 + 3


@pytest.mark.parametrize("n_classes", [2, 3])
def test_measures_are_those_of_scikit_learn(n_classes: int) -> None:
    scores, y = torch.rand(50, n_classes, dtype=torch.float64), torch.arange(50) % n_classes
    fitted = Fitted(lambda x: scores, lambda: Description(np.ones(1), 1))
    found = compare.measure(fitted, Split(torch.zeros(50, 1), y))
    expected = roc_auc_score(y, scores[:, 1] - scores[:, 0]) if n_classes == 2 else accuracy_score(y, scores.argmax(1))
    assert found == pytest.approx(100 * expected, abs=1e-4)


def test_trials_are_the_same_for_all_problems_and_the_best_on_what_is_held_out_is_taken() -> None:
    for method in compare.METHODS:
        drawn = [compare.drawn("3-D XOR p=60", method, trial, 6) for trial in range(6)]
        assert len({json.dumps(one, sort_keys=True) for one in drawn}) == 6, "all methods have as many trials"
        space, _, defaults = compare.METHODS[method]
        if defaults is not None:
            assert drawn[0] == defaults
            assert compare.drawn("car", method, 0, 1) == defaults
        from_space = drawn if defaults is None else drawn[1:]
        for name, values in space.items():
            counts = Counter(json.dumps(one[name]) for one in from_space)
            assert set(counts) <= set(map(json.dumps, values))
            few = 1 if len(from_space) == 6 else 2  # a value's share of five strata can touch a stratum at either side
            assert all(abs(counts[json.dumps(value)] - len(from_space) / len(values)) < few for value in values), name
        for trial, one in enumerate(drawn):
            for problem, part in (("car", 2), ("madelon", 2), ("Yale", 8)):
                fewer = {"steps": one["steps"] // part} if "steps" in one else {}
                assert compare.drawn(problem, method, trial, 6) == one | fewer
    rows = [
        {"problem": "a", "method": "m", "validation": value, "settings": settings}
        for value, settings in ((1.0, "x"), (5.0, "y"), (2.0, "z"), (1.0, "x"), (0.0, "y"), (4.0, "z"))
    ]
    assert compare.best(rows) == {("a", "m"): "z"}


@pytest.mark.parametrize(
    ("name", "why"), [("Yale", "'Yale': its file was not found"), ("yale", "'yale': allowed are 3-D XOR p=60,")]
)
def test_a_problem_that_cannot_be_had_is_an_error(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTNING_CPNA_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        compare.main(["--problems", name, "--out", str(tmp_path)])
    assert why in capsys.readouterr().err


def test_what_is_held_out_is_a_quarter_of_each_class() -> None:
    train, held = held_out(blobs(), 0)
    assert (len(train.y), len(held.y)) == (90, 30)
    assert torch.bincount(held.y).tolist() == [10, 10, 10]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[set[float]]]:
    """Note which rows of a set, whose rows bear their numbers, a method is fitted to and measured on."""
    seen: dict[str, list[set[float]]] = {"fitted": [], "measured": []}

    def fit(settings: Any, train: Split, n_classes: int, seed: int) -> Fitted:
        seen["fitted"].append(set(train.x[:, 0].tolist()))
        return Fitted(lambda x: torch.zeros(len(x), n_classes), lambda: Description(np.ones(10), 1))

    def measure(fitted: Fitted, split: Split) -> float:
        seen["measured"].append(set(split.x[:, 0].tolist()))
        return 50.0

    rows = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    parts = [Split(part.float()[:, None].expand(-1, 10), part % 3) for part in rows.split([80, 40])]
    monkeypatch.setattr(problems, "_parts", lambda *_: parts)
    monkeypatch.setattr(problems, "_scaled", lambda name, train, test: (train, test))
    monkeypatch.setitem(compare.METHODS, "SET", compare.METHODS["SET"]._replace(fit=fit))
    monkeypatch.setattr(compare, "measure", measure)
    return seen


def test_nothing_is_chosen_on_rows_that_are_tested_and_nothing_is_tested_on_rows_that_are_fitted(
    seen: dict[str, list[set[float]]],
) -> None:
    for fold in range(2):
        compare.search(problem="Yale", method="SET", trial=0, settings="{}", fold=fold, folder=None)
    chosen_on = set[float]().union(*seen["fitted"], *seen["measured"])
    assert len(chosen_on) == 80
    for fitted, measured in zip(seen["fitted"], seen["measured"], strict=True):
        assert len(fitted) == 60
        assert not fitted & measured
    for key in seen:
        seen[key].clear()
    for seed in range(6000, 6005):
        compare.repeat(problem="Yale", method="SET", seed=seed, settings="{}", folder=None)
    assert len(set(map(frozenset, seen["measured"]))) == 5, "every seed tests other rows"
    for fitted, measured in zip(seen["fitted"], seen["measured"], strict=True):
        assert (len(fitted), len(measured)) == (100, 20)
        assert not measured & (chosen_on | fitted)


def test_a_network_does_not_draw_the_numbers_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def fit(settings: Any, train: Split, n_classes: int, seed: int) -> Fitted:
        given[:] = [train, seed]
        return Fitted(lambda x: torch.zeros(len(x), n_classes), lambda: Description(np.ones(60), 1))

    monkeypatch.setitem(compare.METHODS, "SET", compare.METHODS["SET"]._replace(fit=fit))
    compare.repeat(problem="3-D XOR p=60", method="SET", seed=6003, settings="{}", folder=None)
    train, seed = given
    torch.manual_seed(seed)
    weight = torch.nn.Linear(60, 50).weight.detach()
    alike = torch.corrcoef(torch.cat([weight.flatten()[None], train.x[:50].flatten()[None]]))[0, 1]
    assert abs(float(alike)) < 0.1
    assert load("3-D XOR p=60", 1, None).relevant == frozenset({0, 1, 2})


@pytest.mark.parametrize("name", ["GLIOMA", "PCMAC", "car"])
def test_a_real_set_is_split_into_what_is_fitted_and_what_is_tested(name: str) -> None:
    (needs if name in ASU else needs_uci)(name)
    searched, tested = problems.load(name, problems.SEARCHED, None), problems.load(name, 6000, None)
    n = len(searched.train.y) + len(searched.test.y)
    assert len(tested.test.y) == len(searched.test.y) // 2
    assert len(tested.train.y) == n - len(tested.test.y)
    assert tested.n_classes == searched.n_classes


def test_leaves_need_no_more_than_an_eighth_of_the_examples() -> None:
    train = blobs(24)
    assert methods._leaf({"min_samples_leaf": 10, "other": 5}, train) == {"min_samples_leaf": 3, "other": 5}
    assert methods._leaf({"min_samples_leaf": 2}, train) == {"min_samples_leaf": 2}


def test_lasso_of_several_classes_reads_nothing_just_below_the_smallest_penalty() -> None:
    for n_classes in (2, 3):
        data = blobs()
        data = Split(data.x - data.x.mean(0), data.y % n_classes)
        assert methods.logistic({"times": 0.9}, data, n_classes, 0).features == []
        assert methods.logistic({"times": 2.0}, data, n_classes, 0).features


def test_the_features_that_matter_most_are_read() -> None:
    fitted = Fitted(lambda x: x, lambda: Description(np.array([0.0, 3.0, 1.0, 0.0, 2.0]), 1))
    assert fitted.features == [1, 2, 4]
    assert fitted.top(2) == [1, 4]
    assert fitted.top(4) == [1, 4, 2]


def test_the_tables_from_rows_made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "METHODS", {method: compare.METHODS[method] for method in ("XGBoost", "SET")})
    common = {"n_test": 700, "features": 4, "parameters": 1000, "fit_seconds": 2.0, "predict_seconds": 0.0015}
    rows = [
        {"problem": problem, "method": method, "test": test, **common, **known}
        for problem, known in (("a", {}), ("b", {"precision": 0.5, "recall": 1.0, "top": 0.75}))
        for method, tests in (("XGBoost", (90.0, 92.0)), ("SET", (90.4, 90.4) if problem == "a" else (90.5, 90.5)))
        for test in tests
    ]
    rows[-1] |= {"precision": 0.25, "recall": 0.5, "fit_seconds": 6.0}
    searched = [{"method": method, "seconds": 600.0} for method in ("XGBoost", "XGBoost", "SET")]
    lines = compare.table(rows, searched).splitlines()
    assert "| a | 700 | **91.0 ± 1.4** | 90.4 ± 0.0 |" in lines
    assert "| b | 700 | **91.0 ± 1.4** | **90.5 ± 0.0** |" in lines, "what is hardly below is bold, too"
    assert "| features: precision / recall, top | b |" in lines
    assert "| SET | 4: 0.38 / 0.75, 0.75 (all in 1 of 2) |" in lines
    assert "| XGBoost | 1.0 / 1.0 | 1 / 1 | 4 | 1,000 | 2.0 (2) | 1.5 | 1,200 |" in lines
    assert "| SET | 2.0 / 2.0 | 1 / 0 | 4 | 1,000 | 3.0 (6) | 1.5 | 600 |" in lines
    few = [row | {"n_test": 9, "test": 80.0 if row["method"] == "SET" else 91.0} for row in rows]
    assert "| a | 9 | **91.0 ± 0.0** | **80.0 ± 0.0** |" in compare.table(few, searched).splitlines(), (
        "one tested row is no difference"
    )
    once = compare.table(rows[::2], searched).splitlines()
    assert "| a | 700 | 90.0 | 90.4 |" in once, "one split has no spread"


def test_the_page_shows_the_committed_results_of_settings_that_were_best_in_the_search() -> None:
    root = Path(__file__).parents[1]
    rows, searched = (
        load_rows(root / "examples" / "compare" / "results" / f"{name}.csv") for name in ("compare", "search")
    )
    page = (root / "RESULTS.md").read_text()
    assert fill(page, "examples.compare", compare.table(rows, searched)) == page
    chosen = compare.best(searched)
    assert load_rows(root / "examples" / "compare" / "results" / "chosen.csv") == compare.listed(chosen)
    assert {(row["problem"], row["method"]): row["settings"] for row in rows} == chosen
    tried = Counter((row["problem"], row["method"]) for row in searched)
    assert set(tried.values()) == {compare.SIZES["reduced"].trials * compare.SIZES["reduced"].folds}
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    for n in (1, 2, len(problems)):
        drawn = compare.draw([row for row in rows if row["problem"] in problems[:n]]).axes
        assert [axes.get_title() for axes in drawn if axes.get_visible()] == problems[:n]
        assert all(axes.yaxis_inverted() for axes in drawn), "from above as in the table"


def test_a_repeat_counts_the_relevant_features(monkeypatch: pytest.MonkeyPatch) -> None:
    importances = np.zeros(40)
    importances[[0, 1, 7, 9]] = [1.0, 0.2, 0.5, 0.1]
    fitted = Fitted(lambda x: torch.rand(len(x), 2), lambda: Description(importances, 5), certified=True)
    monkeypatch.setitem(compare.METHODS, "SET", compare.METHODS["SET"]._replace(fit=lambda *_: fitted))
    row = compare.repeat(problem="4-D XOR p=40", method="SET", seed=1, settings="{}", folder=Path())
    assert (row["precision"], row["recall"], row["features"], row["parameters"]) == (0.5, 0.5, 4, 5)
    assert row["n_test"] == problems.N
    assert (row["top"], row["certified"]) == (0.5, True)
