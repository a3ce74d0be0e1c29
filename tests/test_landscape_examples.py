"""The landscape examples: their parts against loops and closed forms, and their commands."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from examples.data import DATA_VARIABLE
from examples.landscape import cpna, evci, filters, level_sets, networks, sagun, xord
from examples.page import fill
from lightning_cpna import sparsity_of
from lightning_cpna.landscape import LossSurface, hessian, n_outliers
from lightning_cpna.sweeps import load_rows

ROOT = Path(__file__).parents[1]
MODULES: dict[str, Any] = {
    "evci": evci,
    "level_sets": level_sets,
    "sagun": sagun,
    "xord": xord,
    "filters": filters,
    "cpna": cpna,
}


def test_a_positive_example_of_xord_has_a_pair_of_equal_signs_and_a_negative_one_none() -> None:
    generator = torch.Generator().manual_seed(0)
    for diverse in (0.0, 1.0):
        x, y = xord.data(400, diverse, generator)
        assert x.shape == (400, xord.PAIRS, 2)
        assert y.sum() == 200
        for pairs, label in zip(x.tolist(), y.tolist(), strict=True):
            kinds = {tuple(pair) for pair in pairs if pair[0] == pair[1]}
            assert len(kinds) == (1 + int(diverse) if label else 0)
            assert all(abs(sign) == 1 for pair in pairs for sign in pair)


def test_filters_of_xord_answer_as_in_a_loop() -> None:
    net = xord.Filters(3, torch.Generator().manual_seed(0))
    x, _ = xord.data(5, 0.5, torch.Generator().manual_seed(1))
    for example, output in zip(x, net(x), strict=True):
        answers = [max(max(0.0, float(w @ pair)) for pair in example) for w in net.weight.detach()]
        assert float(output) == pytest.approx(sum(answers[:3]) - sum(answers[3:]), abs=1e-7)


def test_a_large_network_solves_xord_and_finds_both_patterns() -> None:
    row = xord.train(k=50, margin=8.0, seed=0)
    assert row["training_error"] == row["test_error"] == 0
    assert row["both_patterns"] == 1
    assert row["angle_end"] < 5 < row["angle_start"]


def test_the_covariance_of_output_gradients_is_the_first_term_of_the_hessian() -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    linear = nn.Linear(4, 3).double()  # whose outputs have no curvature: the first term is all of the Hessian
    expected = torch.linalg.eigvalsh(hessian(LossSurface(linear, [(x, y)], networks.cross_entropy))).flip(0)
    found = sagun.gauss_newton(linear, (x, y))
    assert torch.allclose(found[: len(expected)], expected, rtol=0, atol=1e-12)
    net = networks.mlp([4, 5, 3], 0)
    with torch.no_grad():
        p = net(x).softmax(1)
    total = torch.zeros(sum(w.numel() for w in net.parameters()), dtype=torch.float64).diag()
    for example, probabilities in zip(x, p, strict=True):
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(out, list(net.parameters()), retain_graph=True)])
                for out in net(example[None])[0]
            ]
        )
        total += rows.T @ (probabilities.diag() - probabilities.outer(probabilities)) @ rows / 20
    assert torch.allclose(sagun.gauss_newton(net, (x, y))[:10], torch.linalg.eigvalsh(total).flip(0)[:10], atol=1e-12)


def test_losses_and_errors_are_those_of_both_kinds_of_output() -> None:
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 2
    one = nn.Linear(4, 1).double()
    two = nn.Linear(4, 2).double()
    with torch.no_grad():
        two.weight.copy_(torch.cat([torch.zeros(1, 4), one.weight]))
        two.bias.copy_(torch.cat([torch.zeros(1), one.bias]))
        assert torch.allclose(networks.cross_entropy(one, (x, y)), networks.cross_entropy(two, (x, y)))
        assert (
            networks.error(one, (x, y))
            == networks.error(two, (x, y))
            == (one(x)[:, 0].sign() != 2 * y - 1).double().mean()
        )


def test_training_keeps_removed_connections_and_stops_at_the_loss() -> None:
    batch, _ = networks.xor(2, 10, 200, 0)
    net = evci._pruned(networks.mlp([10, 32, 1], 0), 0.2)
    twin = evci._same_mask(net, dict(networks.mlp([10, 32, 1], 1).state_dict()))
    for one in (net, twin):
        assert networks.train(one, batch, 50, 0.01) == 50
        for name, mask in sparsity_of(one).masks.items():
            assert torch.equal(one.get_parameter(name) != 0, mask.live)
            assert torch.equal(mask.live, sparsity_of(net).masks[name].live)
    wide = networks.mlp([10, 64, 1], 0)
    steps = networks.train(wide, batch, 2000, 0.01, loss=0.1)
    assert steps < 2000
    assert networks.cross_entropy(wide, batch) <= 0.1


def test_small_batches_climb_and_fall_within_one_basin() -> None:
    rows = sagun.one_basin(seed=0)
    training, line = ([row["loss"] for row in rows if row["part"] == part] for part in ("training", "line"))
    assert max(training) > 3 * training[0] > 3 * training[-1]
    assert max(line) <= line[0] * 1.001
    assert (line[0], line[-1]) == pytest.approx((training[0], training[-1]), rel=1e-9)


def make_small(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Make a module's experiment a small one."""
    values: dict[str, dict[str, Any]] = {
        "evci": {"STEPS": 5, "FINE_TUNING": 5, "CURVE_STEPS": 2},
        "level_sets": {"EVALUATIONS": 20, "TRAINING": 20, "CASES": level_sets.CASES[::7]},
        "sagun": {
            "LOSS": 1.0,
            "CASES": [(2, 16), (10, 16)],
            "WIDTHS": [16],
            "CLASSES": [2, 10],
            "SEPARATIONS": [1.0, 2.0],
        },
        "xord": {"FILTERS": [4, 120], "STEPS": 5},
        "filters": {"FILTERS": [4, 8], "SAMPLES": 200, "EPOCHS": 2},
        "cpna": {"N": 250, "CURVE_STEPS": 2},
    }
    for name, value in values[module.MODULE.split(".")[-1]].items():
        monkeypatch.setattr(module, name, value)
    if module is cpna:
        short = [(phase.__class__(2, phase.batch_size), pruning) for phase, pruning in cpna.recipe(3, cpna.METHOD)]
        monkeypatch.setattr(cpna, "recipe", lambda k, method: short)
    if module is filters and not (os.environ.get(DATA_VARIABLE) and Path(os.environ[DATA_VARIABLE], "mnist").is_dir()):
        pytest.skip(f"MNIST is not in a folder that {DATA_VARIABLE} names")


@pytest.mark.parametrize("name", MODULES)
def test_a_command_writes_its_rows_its_figure_and_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = MODULES[name]
    make_small(monkeypatch, module)
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- results of examples.landscape.{name} -->\n<!-- end of results -->\nafter\n")
    module.main(["--seeds", "1", "--jobs", "1", "--out", str(tmp_path), "--page", str(page)])
    rows = load_rows(tmp_path / f"{name}.csv")
    assert rows
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert module.table(rows) in capsys.readouterr().out
    assert f"{module.table(rows)}\n" in page.read_text()


@pytest.mark.parametrize("name", MODULES)
def test_the_tables_of_the_page_are_made_from_the_committed_results(name: str) -> None:
    page = (ROOT / "RESULTS.md").read_text()
    rows = load_rows(ROOT / "examples" / "landscape" / "results" / f"{name}.csv")
    assert fill(page, f"examples.landscape.{name}", MODULES[name].table(rows)) == page


def committed(name: str) -> list[dict[str, Any]]:
    return load_rows(ROOT / "examples" / "landscape" / "results" / f"{name}.csv")


def test_the_committed_spectra_have_as_many_outliers_as_classes_less_one() -> None:
    rows = committed("sagun")
    for classes, width in sagun.CASES:
        assert n_outliers(sagun.profile(rows, classes, width)) == classes - 1
    shares = [
        sum(row["bulk"] for row in rows if row.get("width") == width and row.get("classes") == 10)
        for width in sagun.WIDTHS
    ]
    assert all(less < more for less, more in itertools.pairwise(shares))


def test_the_committed_barriers_are_higher_among_live_weights_than_among_all() -> None:
    heights = {(row["task"], row["seed"], row["path"]): row["barrier"] for row in committed("evci")}
    for task, seed in {(task, seed) for task, seed, _ in heights}:
        for degree in ("quadratic", "cubic"):
            live, every = (heights[task, seed, f"{degree}, {which} weights"] for which in ("live", "all"))
            assert live > every or live == every == 0
            assert every < heights[task, seed, "line"]


def test_the_committed_walks_shrink_the_weights_and_the_test_loss() -> None:
    rows = committed("level_sets")
    for case in level_sets.CASES:
        for first, last in level_sets._ends(rows, case, "l2"):
            assert last["norm"] < 0.9 * first["norm"]
            assert last["test_loss"] < first["test_loss"]
            assert last["deviation"] <= 1e-4
        for first, last in level_sets._ends(rows, case, "random"):
            assert last["test_loss"] > 5 * first["test_loss"]


def test_committed_networks_of_fifty_filters_and_more_find_all_of_xord() -> None:
    rows = [row for row in committed("xord") if row["margin"] == 8]
    for k in (50, 120):
        assert all(row["test_error"] == 0 and row["both_patterns"] == 1 for row in rows if row["k"] == k)
    assert sum(row["both_patterns"] for row in rows if row["k"] == 2) <= 10
