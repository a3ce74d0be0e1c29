"""The ticket and retraining examples: their experiments, tables, figures and command lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")

from examples.data import DATA_VARIABLE, Split, Splits
from examples.page import fill
from examples.results import load
from examples.tickets import experiments
from examples.tickets.__main__ import main, parse
from examples.tickets.experiments import EXPERIMENTS, weights
from examples.tickets.figures import table
from examples.xor import retrain
from tests.helpers import tensorboard

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "tickets" / "results"


def small(seed: int, folder: Path | None = None) -> Splits:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(10, (n,), generator=generator) for n in (400, 100, 200)]
    means = torch.randn(10, 784, generator=torch.Generator().manual_seed(1))
    return Splits(*(Split(means[y] + torch.randn(len(y), 784, generator=generator), y) for y in parts))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "mnist", small)
    monkeypatch.setattr(experiments, "STEP", 2)
    monkeypatch.setattr(experiments, "EVERY", 2)


ROUNDS = {
    "iterative": ["dense", *["reinit", "shuffle", "init"] * 2],
    "rewinding": ["dense", *["step 2"] * 2],
    "keeping": ["dense", *["keep"] * 2],
    "one-shot": ["dense", "reinit", "shuffle", "init"],
    "objection": ["dense", *["reinit", "init"] * 2] * 4,
    "transfer": ["dense", "reinit", "shuffle", "init"],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_rounds_with_exact_counts(name: str, tiny: None) -> None:
    rows = EXPERIMENTS[name](0, None, None, epochs=1, levels=2)
    assert [row["branch"] for row in rows] == ROUNDS[name]
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    sizes = dict(zip(weights(1), (784 * 300, 300 * 100, 100 * 10), strict=True))
    ends = sum(round(part * sizes[name]) for name, part in weights(2).items())
    if name != "objection":
        assert rows[-1]["connections"] == ends
    if name == "iterative":
        middle = sum(int((sizes[name] * round(part * sizes[name])) ** 0.5) for name, part in weights(2).items())
        assert [row["connections"] for row in rows[1:]] == [middle] * 3 + [ends] * 3
    if name == "objection":
        units = [row for row in rows if row["what"] == "units" and row["level"] == 2]
        assert {row["connections"] for row in units} == {784 * 147 + 147 * 49 + 49 * 10}


def test_transfer_trains_on_the_other_digits() -> None:
    data = small(0)
    for which in (range(5), range(5, 10)):
        part = experiments._digits(data, which).train
        rows = [row for row, y in enumerate(data.train.y.tolist()) if y in which]
        assert torch.equal(part.x, data.train.x[rows])
        assert torch.equal(part.y + which.start, data.train.y[rows])


def test_the_command_line_writes_results_figures_and_a_board(tmp_path: Path, tiny: None) -> None:
    arguments = ["--seeds", "2", "--epochs", "1", "--jobs", "1", "--out", str(tmp_path), "--experiments", "one-shot"]
    main(arguments)
    rows = load(tmp_path, "one-shot")
    assert sorted({row["seed"] for row in rows}) == [0, 1]
    assert (tmp_path / "tickets.png").stat().st_size > 10_000
    ask = tensorboard(tmp_path / "tensorboard")
    tags: Any = ask("scalars/tags")
    assert all("ticket/init/accuracy" in tags[run] for run in tags)
    assert len(tags) == 12
    file, _ = (tmp_path / "runs").glob("*.json")
    changed = json.loads(file.read_text())
    changed["rows"][0]["accuracy"] = 12.5
    file.write_text(json.dumps(changed))
    main(arguments)  # what is there is not run again
    assert 12.5 in {row["accuracy"] for row in load(tmp_path, "one-shot")}


def test_what_is_wrong_on_the_command_line_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--experiments", "best"])
    assert "invalid choice: 'best'" in capsys.readouterr().err


def test_real_digits_are_learned_and_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("MNIST is not there: LIGHTNING_CPNA_DATA names no folder with mnist/")
    monkeypatch.setattr(experiments, "EVERY", 2)
    dense, reinit, shuffle, init = EXPERIMENTS["one-shot"](0, None, None, epochs=1, levels=2)
    assert dense["accuracy"] > 95
    assert init["accuracy"] > dense["accuracy"] - 0.5
    assert init["accuracy"] > max(reinit["accuracy"], shuffle["accuracy"])


def test_the_table_is_made_from_the_committed_results() -> None:
    page = (ROOT / "RESULTS.md").read_text()
    results = {path.stem: load(RESULTS, path.stem) for path in sorted(RESULTS.glob("*.json"))}
    assert fill(page, "examples.tickets", table(results)) == page
    assert all(len({row["seed"] for row in rows}) >= 3 for rows in results.values())
    assert set(results) == set(EXPERIMENTS)


def test_what_cpna_left_is_retrained_under_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.xor.problem import Phase
    from examples.xor.recipes import hidden, inputs

    short = [(Phase(4), None), (Phase(20, None), hidden(12)), (Phase(20, None), inputs(24)), (Phase(2), None)]
    monkeypatch.setattr(retrain, "recipe", lambda k, method: short)
    rows = retrain.retrain(3, "cpna_all", 0, tmp_path, n=300)
    assert [row["round"] for row in rows] == ["cpna", "reinit", "init"]
    assert [row["connections"] for row in rows] == [{"net.2.weight": 12, "net.0.weight": 24}] * 3
    assert len({row["test_auc"] for row in rows}) == 3


def test_the_table_of_retraining_is_made_from_the_committed_results() -> None:
    page = (ROOT / "RESULTS.md").read_text()
    rows = load(ROOT / "examples" / "xor" / "results" / "retrain", "retrain")
    assert fill(page, "examples.xor.retrain", retrain.table(rows)) == page


def test_the_figure_of_retraining_sorts_the_trials(tmp_path: Path) -> None:
    rows = [
        {"k": 3, "method": "cpna_hidden", "seed": seed, "round": name, "test_auc": auc}
        for name in retrain.ROUNDS
        for seed, auc in enumerate((50.0, 70.0, 60.0))
    ]
    retrain.draw(rows, tmp_path / "retrain.png")
    assert (tmp_path / "retrain.png").stat().st_size > 10_000
    assert "60.0 ± 10.0" in retrain.table(rows)
