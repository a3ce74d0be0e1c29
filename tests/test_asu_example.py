"""The SET and NPSET example: sizes of the paper's networks, methods, tables and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")

from examples.asu import million
from examples.asu.__main__ import main, parse
from examples.asu.figures import ORDERS, WHICH, figure1, figure2
from examples.asu.problem import METHODS, PROBLEMS, pruned_widths
from examples.asu.tables import TABLES, pruned, sizes, table2
from examples.asu.training import MADELON, MLP, RECIPES, build, data, run
from examples.page import fill
from examples.results import load
from lightning_cpna import SparseLinear
from tests.helpers import needs, tensorboard

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "asu" / "results"


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_committed_sizes_are_the_papers_table_3(name: str) -> None:
    [row] = [row for row in load(RESULTS, "table3") if row["set"] == name]
    problem = PROBLEMS[name]
    assert row["neurons"] == problem.npset_neurons
    assert row["NPSET"] == pytest.approx(problem.npset_connections, rel=0.05)
    difference = abs(row["SET"] - problem.set_connections)
    assert difference <= max(0.001 * problem.set_connections, 2 * row["spread"])  # one draw of the paper's


@pytest.mark.parametrize("name", ["Lung-discrete", "Yale"])
def test_the_committed_sizes_are_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.asu.tables.PROBLEMS", {name: PROBLEMS[name]})
    assert sizes() == [row for row in load(RESULTS, "table3") if row["set"] == name]


@pytest.mark.parametrize("name", ["Leukemia", "CLL-SUB-111"])
def test_pruned_widths_are_the_papers_neurons(name: str) -> None:
    n_in, first, second, _ = pruned_widths(PROBLEMS[name].widths)
    assert n_in + first + second == PROBLEMS[name].npset_neurons


def test_a_topology_that_is_drawn_again_differs() -> None:
    assert pruned(PROBLEMS["Lung-discrete"], 1)[1] != pruned(PROBLEMS["Lung-discrete"], 2)[1]


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_page_are_made_from_the_committed_results(name: str) -> None:
    page = (ROOT / "RESULTS.md").read_text()
    assert fill(page, f"examples.asu {name}", TABLES[name](load(RESULTS, name))) == page


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_network_and_trains_for_the_same_steps(method: str) -> None:
    needs("Lung-discrete")
    recipe = dataclasses.replace(RECIPES["Lung-discrete"], epochs=13)
    row, module = run("Lung-discrete", method, 0, recipe=recipe)
    hidden = {
        "NPSET": (276, 276),
        "1st NPSET": (276, 300),
        "2nd NPSET": (300, 276),
    }  # two removals of 4 %: 300, 288, 277
    first, second = hidden.get(method, (66, 66) if method.startswith("Direct") else (300, 300))
    assert row["neurons"] == 325 + first + second + (method in ("1st NPSET", "2nd NPSET")) + 2 * (method == "NPSET")
    assert row["steps"] == 13 * 24
    assert len(row["test"]) == len(row["train"]) == 13
    dense = method in ("Direct FC", "Dense")
    assert isinstance(module.net[1], SparseLinear) is not dense
    if dense:
        assert row["connections"] == 325 * first + first * second + second * 7
    assert row["train"][-1] > 60  # chance is 29


def test_direct_set_has_as_many_connections_as_table_3() -> None:
    problem = PROBLEMS["GLIOMA"]
    torch.manual_seed(0)
    module, _ = build(problem, "Direct SET", RECIPES["GLIOMA"])
    n = sum(weight.numel() for weight in module.weights.values())
    assert n == pytest.approx(problem.npset_connections, rel=0.05)
    with pytest.raises(ValueError, match="method is 'RigL'; allowed is one of SET, NPSET"):
        build(problem, "RigL", RECIPES["GLIOMA"])


def test_a_validation_part_is_of_the_training_part() -> None:
    needs("Yale")
    (train, test), (rest, held) = data("Yale", 3, None), data("Yale", 3, None, validate=True)
    assert [len(part.y) for part in (train, test, rest, held)] == [110, 55, 83, 27]
    assert sorted([*rest.y.tolist(), *held.y.tolist()]) == sorted(train.y.tolist())


def test_madelons_proximal_step_is_the_soft_threshold() -> None:
    torch.manual_seed(0)
    module = MLP((20, 10, 10, 2), MADELON, 2.0)
    before = {name: weight.detach().clone() for name, weight in module.weights.items()}
    module.on_train_batch_end()
    for name, weight in module.weights.items():
        expected = [max(abs(w) - 0.02 * 0.03, 0.0) * (1 if w > 0 else -1) for w in before[name].tolist()]
        assert weight.tolist() == pytest.approx(expected, abs=1e-7)


def rows(**values: Any) -> list[dict[str, Any]]:
    return [
        {"set": "Yale", "method": method, "seed": seed, "n_test": 55, "test": [60.0, 70.0], "train": [80.0, 99.0]}
        | values
        for method, seed in itertools.product(("SET", "Dense"), (0, 2))
    ]


def test_table_2_has_best_last_paper_and_what_reaches_it() -> None:
    text = table2(rows(test=[72.0, 65.0]))
    assert "| Yale | 72.0 ± 0.0 (70.9)<br>65.0 ± 0.0 | 72.0 ± 0.0<br>65.0 ± 0.0 |" in text
    assert "| best ≥ paper - 1 example | 1 of 1 |  |" in text
    assert "| last ≥ paper - 1 example | 0 of 1 |  |" in text
    assert "| seeds | 2 | 2 |" in text
    assert "| best ≥ paper - 1 example | 1 of 1 |  |" in table2(rows(test=[70.9 - 100 / 55 + 0.01]))
    assert "| best ≥ paper - 1 example | 0 of 1 |  |" in table2(rows(test=[70.9 - 100 / 55 - 0.01]))
    assert "| seeds | 1-2 | 0-2 |" in table2([*rows(), *(row | {"set": "GLIOMA"} for row in rows()[:1])])


def test_figures_are_drawn(tmp_path: Path) -> None:
    removed = [
        {"set": "Yale", "seed": seed, "layer": layer, "order": order, "test": [50.0 + i for i in range(20)]}
        for seed, layer, order in itertools.product((0, 1), WHICH, ORDERS)
    ]
    for file in (figure1(removed, tmp_path), figure2(rows(), tmp_path)):
        assert file.read_bytes()[:4] == b"\x89PNG"


def test_the_command_line_trains_once_and_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("Lung-discrete")
    short = RECIPES | {"Lung-discrete": dataclasses.replace(RECIPES["Lung-discrete"], epochs=2)}
    monkeypatch.setattr("examples.asu.training.RECIPES", short)
    out = ["--out", str(tmp_path), "--jobs", "1"]
    main(["--methods", "SET", "--seeds", "2", *out])
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 2
    first = json.loads(files[0].read_text())
    (row,) = first["rows"]
    files[0].write_text(json.dumps(first | {"rows": [row | {"seconds": -1}]}))
    main(["--table2", "--set", "Lung-discrete", "--methods", "SET", "--seeds", "2", *out])
    again = {found["seed"]: found for found in load(tmp_path, "table2")}
    assert set(again) == {100, 101}
    assert again[row["seed"]]["seconds"] == -1
    ask, run = tensorboard(tmp_path / "tensorboard"), "Lung-discrete_SET/seed_100"
    tags = {
        "accuracy/test",
        "accuracy/train",
        "rewiring/connections",
        "rewiring/exchanged",
        "rewiring/net.3.weight/live_units",
    }
    assert tags <= set(ask("scalars/tags")[run])
    curve = [point[2] for point in ask(f"scalars/scalars?tag=accuracy/test&run={run}")]
    runs = [json.loads(file.read_text()) for file in files]
    (expected,) = (file["rows"][0]["test"] for file in runs if file["setting"]["seed"] == 100)
    assert curve == pytest.approx(expected, abs=1e-3)
    main(["--figure1", "--set", "Lung-discrete", *out])
    curves = [row["test"] for row in load(tmp_path, "figure1")]
    assert [len(curve) for curve in curves] == [20] * len(WHICH) * len(ORDERS)
    assert curves[0][0] == expected[-1]
    assert (tmp_path / "figure1.png").is_file()


def test_bad_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--seeds", "0"])
    assert "argument --seeds: 0 is too small; allowed is 1 or more" in capsys.readouterr().err


def test_the_million_neuron_run_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(million, "WIDTHS", (64, 300, 300, 2))
    for epsilon in ("2", "1", "2"):
        million.main(["--epsilon", epsilon, "--steps", "2", "--batch-size", "4", "--out", str(tmp_path)])
    found = load(tmp_path, "million")
    assert [row["epsilon"] for row in found] == [1.0, 2.0]
    assert [row["neurons"] for row in found] == [666, 666]
    assert found[0]["connections"] < 364 + 600 + 302 < found[1]["connections"]
