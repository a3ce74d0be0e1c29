"""The figures of the XOR experiment: their numbers against hand-made rows and plain loops, and their commands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from torchmetrics.functional.classification import binary_auroc

from examples.page import fill
from examples.results import Row
from examples.xor import deep, minima, threshold, width
from examples.xor.dense import BATCH_SIZE, LR, dense
from examples.xor.problem import XORData
from examples.xor.recipes import PROBLEMS
from lightning_cpna.sweeps import load_rows

ROOT = Path(__file__).parents[1]
MODULES: dict[str, Any] = {"minima": minima, "threshold": threshold, "width": width, "deep": deep}


def test_dense_networks_are_those_of_a_plain_loop() -> None:
    rows = dense(k=3, p=5, n=500, hidden=6, data_seed=4, n_inits=2, epochs=3, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(4)
    train, test = XORData(3, 5, 500, generator), XORData(3, 5, 500, generator)
    for row, seed in zip(rows, (1_004_000, 1_004_001), strict=True):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=LR, weight_decay=1e-3)
        order = torch.Generator().manual_seed(seed)
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = LR if epoch < 2 else LR / 30
            for part in torch.randperm(500, generator=order).split(BATCH_SIZE):
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(net(train.x[part])[:, 0], train.y[part]).backward()
                optimizer.step()
        loss = nn.functional.binary_cross_entropy_with_logits(net(train.x)[:, 0], train.y)
        decay = 1e-3 / 2 * sum(parameter.square().sum() for parameter in net.parameters())
        gradients = torch.autograd.grad(loss + decay, list(net.parameters()))
        assert row["init"] == seed
        assert row["loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
        assert row["gradient"] == pytest.approx(sum(float(g.square().sum()) for g in gradients) ** 0.5, abs=2e-6)
        for value, data in (("train_auc", train), ("test_auc", test)):
            auc = 100 * float(binary_auroc(net(data.x).detach()[:, 0], data.y.int()))
            assert row[value] == pytest.approx(auc, abs=1e-3)


def points(line: Any) -> list[tuple[float, float]]:
    return [(x, round(y, 6)) for x, y in line.get_xydata().tolist()]


def minimum(p: int, data_seed: int, loss: float, auc: float) -> Row:
    return {
        "p": p,
        "data_seed": data_seed,
        "loss": loss,
        "test_auc": auc,
        "k": 3,
        "hidden": 20,
        "n_inits": 3,
        "gradient": auc / 1e4,
    }


def test_minima_are_in_the_order_of_the_loss_of_their_own_data_set() -> None:
    rows = [
        *(minimum(5, 0, loss, auc) for loss, auc in ((0.3, 90.0), (0.1, 99.0), (0.2, 50.0))),
        *(minimum(5, 1, loss, auc) for loss, auc in ((0.6, 70.0), (0.5, 98.0), (0.7, 60.0))),
    ]
    assert minima.by_rank(rows, 5, "loss").tolist() == [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]
    assert minima.by_rank(rows, 5, "test_auc").tolist() == [[99.0, 50, 90], [98.0, 70, 60]]
    assert minima.table(rows).endswith("| 5 | 0.300, 0.400, 0.500 | 98.5, 60.0, 75.0 | 33% | 0.0070 |")
    (line,) = minima.draw(rows).axes[0].lines
    assert points(line) == [(1, 0.3), (2, 0.4), (3, 0.5)]


def test_the_threshold_is_the_highest_dimension_whose_mean_is_high() -> None:
    aucs = {("nn", 100): (99, 80, 91, 70), ("nn", 200): (99, 99, 99, 90), ("fsa_cpna", 100): (60, 60, 60, 60)}
    rows = [
        {"method": method, "n": n, "p": p, "data_seed": seed, "test_auc": auc + 2 * seed - 1}
        for (method, n), values in aucs.items()
        for p, auc in zip((5, 10, 15, 20), values, strict=True)
        for seed in (0, 1)
    ]
    assert threshold.table(rows).split("\n")[2:] == ["| 100 | 15 | none |", "| 200 | 20 |  |"]
    nn_panel = threshold.draw(rows).axes[0]
    assert [points(line) for line in nn_panel.lines] == [
        [(5, 99), (10, 80), (15, 91), (20, 70)],
        [(5, 99), (10, 99), (15, 99), (20, 90)],
    ]


def test_widths_are_shown_by_method_and_problem() -> None:
    common = {"p": 15, "data_seed": 0, "k": 5}
    rows: list[Row] = [
        {**common, "figure": 6, "method": method, "hidden": hidden, "test_auc": auc + hidden / 100}
        for method, auc in (("nn", 70.0), ("cpa_hidden", 80.0), ("cpna_hidden", 90.0))
        for hidden in (200, 100)
    ]
    rows += [
        {"figure": 4, "method": "nn", "k": k, "p": problem.p, "hidden": 100, "data_seed": 0, "test_auc": 50.0 + k}
        for k, problem in PROBLEMS.items()
    ]
    assert width.table(rows).split("\n")[2:] == [
        "| 100 | 71.0 ± 0.0 | 81.0 ± 0.0 | 91.0 ± 0.0 |",
        "| 200 | 72.0 ± 0.0 | 82.0 ± 0.0 | 92.0 ± 0.0 |",
    ]
    left, right = width.draw(rows).axes
    assert [points(bars[0]) for bars in left.containers] == [[(100, 53)], [(100, 54)], [(100, 55)]]
    assert [points(bars[0]) for bars in right.containers] == [
        [(100, 71), (200, 72)],
        [(100, 81), (200, 82)],
        [(100, 91), (200, 92)],
    ]


@pytest.mark.parametrize("depth", deep.DEPTHS)
@pytest.mark.parametrize("method", deep.METHODS)
def test_deep_networks_end_at_their_counts(depth: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "N", 500)
    row = deep.deep(depth=depth, method=method, seed=1, epochs=40)
    widths, counts, _ = deep.DEPTHS[depth]
    sizes = (deep.P, *widths, 1)
    expected = sum(a * b for a, b in itertools.pairwise(sizes)) if method == "nn" else sum(counts)
    assert row["connections"] == expected


@pytest.mark.parametrize("name", MODULES)
def test_a_command_writes_its_rows_its_figure_and_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = MODULES[name]
    small: dict[str, Any] = {
        "minima": {"SIZES": {"quick": (2, 1, 2)}, "N": 250, "DIMENSIONS": [3, 5]},
        "threshold": {
            "SIZES": {"quick": threshold.Size(1, {"nn": [250, 300, 400], "fsa_cpna": [250]}, [5])},
            "HIDDEN": 32,
        },
        "width": {"SIZES": {"quick": (1, 2, [4, 8], [64])}, "N": 250},
        "deep": {
            "SIZES": {"quick": (1, 40)},
            "N": 250,
            "DEPTHS": {n: deep.Depth((32,) * n, (24,) * n + (8,), 1e-3) for n in (2, 3)},
        },
    }
    n_rows = {"minima": 2 * 2, "threshold": 2 * 2, "width": 3 * 2 * 2 + 3, "deep": 6}
    for attribute, value in small[name].items():
        full = value | {"reduced": value["quick"], "full": value["quick"]} if attribute == "SIZES" else value
        monkeypatch.setattr(module, attribute, full)
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- results of examples.xor.{name} -->\n<!-- end of results -->\nafter\n")
    module.main(["--jobs", "1", "--out", str(tmp_path), "--page", str(page)])
    rows = load_rows(tmp_path / f"{name}.csv")
    assert len(rows) == n_rows[name]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert module.table(rows) in capsys.readouterr().out
    assert f"{module.table(rows)}\n" in page.read_text()


def test_a_page_without_marks_is_refused_before_the_work_and_a_quick_look_does_not_fill_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    for arguments, message in (
        (["--page", str(page)], "No such file"),
        (["--quick", "--page", str(page)], "not allowed with --quick"),
    ):
        with pytest.raises(SystemExit):
            minima.main(arguments)
        assert message in capsys.readouterr().err
    page.write_text("nothing")
    with pytest.raises(SystemExit):
        minima.main(["--page", str(page)])
    assert "'<!-- results of examples.xor.minima -->' 0 times" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODULES)
def test_the_tables_of_the_page_are_made_from_the_committed_results(name: str) -> None:
    page = (ROOT / "RESULTS.md").read_text()
    rows = load_rows(ROOT / "examples" / "xor" / "results" / f"{name}.csv")
    assert fill(page, f"examples.xor.{name}", MODULES[name].table(rows)) == page
