"""The UCI example: its data against the published facts, networks side by side against one alone, its counts and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from examples.data import Split, Splits
from examples.page import fill
from examples.side_by_side import Member, Networks, fit, seeded
from examples.uci import __main__ as command
from examples.uci import runs, search
from examples.uci.data import FILES, folds, scaled, splits, uci
from examples.uci.recipes import METHODS, PROBLEMS, phases
from examples.uci.tables import differences, table3
from examples.uci.training import Epochs, Job, Plan, accuracies, train
from lightning_cpna.sweeps import load_rows
from tests.helpers import needs_uci

# rows, features, sizes of the smallest and largest class (the data sets' own documentation)
PUBLISHED = {
    "car": (1728, 21, 65, 1210),
    "segmentation": (2310, 19, 330, 330),
    "optdigits": (5620, 64, 554, 572),
    "mfeat": (2000, 216, 200, 200),
    "isolet": (7797, 617, 298, 300),
}
RESULTS = Path(__file__).parents[1] / "examples" / "uci" / "results"


def blobs(n: int = 300, classes: int = 3, features: int = 8) -> Split:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    means = torch.randn(classes, features, generator=torch.Generator().manual_seed(1))
    return Split(means[y] + 0.7 * torch.randn(n, features, generator=generator), y)


@pytest.mark.parametrize("name", FILES)
def test_the_sets_are_the_published_ones(name: str) -> None:
    needs_uci(name)
    pooled = uci(name)
    sizes = pooled.y.bincount()
    n, features, smallest, largest = PUBLISHED[name]
    assert (tuple(pooled.x.shape), int(sizes.min()), int(sizes.max())) == ((n, features), smallest, largest)
    assert (features, len(sizes)) == (PROBLEMS[name].features, PROBLEMS[name].classes)
    assert not pooled.x.isnan().any()


def test_the_paper_counts_its_connections_as_here() -> None:
    for problem in PROBLEMS.values():
        hidden = problem.equivalent
        assert problem.paper["NN (equivalent)"].connections == (problem.features * hidden, hidden * problem.classes)


def test_parts_are_stratified_disjoint_and_scaled_by_the_training_part() -> None:
    pooled = blobs()
    pooled = Split(torch.cat([pooled.x, torch.full((300, 1), 9.0), torch.arange(300.0)[:, None]], 1), pooled.y)
    parts = splits(pooled, seed=3, validation=0.25)
    assert [len(part.y) for part in parts] == [180, 60, 60]
    assert all(part.y.bincount().tolist() == [len(part.y) // 3] * 3 for part in parts)
    assert parts.train.x.amin(0)[:-2].eq(-1).all()
    torch.testing.assert_close(parts.train.x.amax(0)[:-2], torch.ones(8))
    assert torch.cat([part.x[:, -2] for part in parts]).eq(-1).all(), "a constant feature"
    ids = torch.cat([part.x[:, -1] for part in parts])
    assert len(ids.unique()) == 300
    other = splits(pooled, seed=4, validation=0.25)
    assert not torch.equal(other.test.x, parts.test.x)
    assert torch.equal(splits(pooled, seed=3).test.y, parts.test.y), "the held-out part does not move the test part"


def test_folds_are_of_the_training_part_and_cover_it_once() -> None:
    pooled = blobs()
    marked = Split(torch.arange(300.0)[:, None], pooled.y)
    test = splits(marked, seed=5)
    found = folds(marked, seed=5)
    assert len(found) == 5
    for part in found:
        assert len(part.test.y) == 0
        assert len(part.train.y) + len(part.validation.y) == len(test.train.y) == 240
    assert sum(len(part.validation.y) for part in found) == 240


def test_a_value_outside_the_training_range_stays_outside() -> None:
    train = Split(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]))
    _, other = scaled(train, Split(torch.tensor([[3.0], [1.0]]), torch.tensor([0, 1])))
    assert other.x.ravel().tolist() == [2.0, 0.0]


def test_networks_side_by_side_are_each_one_alone() -> None:
    data = [splits(blobs(n), seed).train for seed, n in enumerate((300, 300, 330))]
    data = [Split(part.x.double(), part.y) for part in data]

    def members() -> list[Member]:
        return [
            Member(
                seeded(seed, lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))).double(),
                part,
                seed,
                lr,
                wd,
            )
            for seed, (part, lr, wd) in enumerate(zip(data, (1e-2, 3e-3, 1e-2), (0.0, 1e-3, 1e-2), strict=True))
        ]

    together = Networks(members(), nn.functional.cross_entropy, 6, 3, decay=0.1)
    fit(together, 32)
    for i, member in enumerate(members()):
        # alone, in a plain loop: the largest network of the fit has more rows than fill a batch, which are left out
        optimizer = torch.optim.Adam(member.net.parameters(), lr=member.lr, weight_decay=member.weight_decay)
        generator = torch.Generator().manual_seed(member.seed)
        n_used = min(len(part.y) for part in data) // 32 * 32
        for epoch in range(6):
            if epoch >= 3:
                optimizer.param_groups[0]["lr"] = member.lr * 30.0 ** -((epoch - 2) / 3)
                optimizer.param_groups[0]["weight_decay"] = 0.1 * member.weight_decay
            for rows in torch.randperm(len(member.data.y), generator=generator)[:n_used].split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(member.net(member.data.x[rows]), member.data.y[rows]).backward()
                optimizer.step()
        for ours, alone in zip(together.nets[i].parameters(), member.net.parameters(), strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-10)


def test_data_that_fill_no_batch_are_refused() -> None:
    member = Member(nn.Linear(8, 3), blobs(30), 0, 1e-3, 0.0)
    with pytest.raises(ValueError, match="batch_size is 32; allowed is 30 or less"):
        fit(Networks([member], nn.functional.cross_entropy, 1, 0), 32)


@pytest.mark.parametrize("method", ["CPNA", "CPA", "score only"])
def test_every_network_ends_at_its_own_counts(method: str) -> None:
    parts = [splits(blobs(), seed, 0.1) for seed in range(2)]
    jobs = [Job(parts[0], 0, 3e-3, 1e-4, 10, 20), Job(parts[1], 1, 3e-3, 1e-4, 6, 12)]
    rows = train(jobs, Plan(METHODS[method], 16, 32, Epochs(4, 20, 10, 4), "path"))
    assert [(row["live_hidden"], row["live_input"]) for row in rows] == [(10, 20), (6, 12)]
    for row in rows:
        assert row["effective_hidden"] <= row["live_hidden"]
        assert row["effective_input"] <= row["live_input"]


@pytest.mark.parametrize("method", ["CPNA", "CPA", "score only", "nodes"])
def test_a_network_that_is_pruned_beside_others_ends_as_it_does_alone(method: str) -> None:
    n_hidden = (4, 6) if method == "nodes" else (10, 8)
    jobs = [Job(splits(blobs(), seed, 0.1), seed, 3e-3, 1e-4, n_hidden[seed], 20) for seed in range(2)]
    plan = Plan(METHODS[method], 16, 32, Epochs(4, 10, 10, 4), "path")
    assert train(jobs, plan) == [row for job in jobs for row in train([job], plan)]


def test_the_epoch_is_chosen_on_the_validation_part_and_of_equals_is_the_last() -> None:
    nan = float("nan")
    test, validation = torch.tensor([90.0, 95.0, 93.0, 91.0]), torch.tensor([80.0, 85.0, 85.0, 84.0])
    assert accuracies(validation, test) == {"best": 95.0, "final": 91.0, "validation": 84.0, "chosen": 93.0}
    assert accuracies(torch.full((4,), nan), test) == {"best": 95.0, "final": 91.0}
    assert accuracies(validation, torch.full((4,), nan)) == {"validation": 84.0}


def test_nodes_are_removed_to_the_equivalent_network() -> None:
    (row,) = train([Job(splits(blobs(), 0), 0, 3e-3, 1e-4, 4, 0)], Plan("nodes", 16, 32, Epochs(4, 20, 1, 2), "path"))
    assert (row["live_units"], row["effective_input"], row["effective_hidden"]) == (4, 4 * 8, 4 * 3)
    assert "chosen" not in row


def test_effective_connections_lie_on_a_path() -> None:
    from examples.uci.training import connections
    from lightning_cpna import sparsity_of

    module = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))])
    masks = sparsity_of(module).masks
    for name, dead in (("0.0.weight", [[0, 0, 1], [1, 1, 1], [0, 1, 1]]), ("0.2.weight", [[0, 0, 1], [1, 0, 1]])):
        masks.add(name, module.get_parameter(name))
        masks[name].remove_(torch.tensor(dead, dtype=torch.bool))
    # unit 0 reads two features and feeds one class; unit 1 reads nothing; unit 2 feeds nothing
    assert connections(module, "0") == {
        "live_input": 3,
        "live_hidden": 3,
        "effective_input": 2,
        "effective_hidden": 1,
        "live_units": 1,
    }


def test_the_search_never_sees_the_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = blobs()
    ids = torch.arange(300.0)[:, None]
    seen: list[Splits] = []
    monkeypatch.setattr(runs, "uci", lambda name, folder: Split(torch.cat([pooled.x, ids], 1), pooled.y))
    monkeypatch.setattr("examples.uci.data.scaled", lambda *parts: list(parts))

    def note(jobs: list[Job], plan: Plan) -> list[dict[str, float]]:
        seen.extend(job.data for job in jobs)
        return [{"validation": 1.0}] * len(jobs)

    monkeypatch.setattr(runs, "train", note)
    plan: dict[str, Any] = {"method": "CPNA", "hidden": 4, "batch_size": 8, "epochs": [1, 1, 1, 1], "score": "path"}
    rows = runs.cross_validate(set="car", choices=[{"lr": 1.0, "weight_decay": 0.0}], **plan)
    assert [row["fold"] for row in rows] == list(range(5))
    used = torch.cat([part.x[:, -1] for data in seen for part in data]).unique()
    test = splits(Split(ids, pooled.y), runs.SEARCHED_SPLIT).test
    assert len(used) == 240
    assert not set(used.tolist()) & set(test.x.ravel().tolist())


def test_the_best_has_the_highest_mean_and_of_equals_the_first() -> None:
    rows = [
        {"method": "CPNA", "lr": lr, "weight_decay": 0.0, "validation": value}
        for lr, values in ((1.0, (90, 92)), (2.0, (91, 93)), (3.0, (92, 92)))
        for value in values
    ]
    assert search.best(rows, ("lr", "weight_decay")) == {"lr": 2.0, "weight_decay": 0.0}


def test_the_grid_is_the_papers() -> None:
    found = search.settings("grid", "car", {})
    points = {(s["hidden"], s["batch_size"], choice["weight_decay"]) for s in found for choice in s["choices"]}
    assert len(points) == 72
    assert points == {
        (h, b, w) for h in (16, 32, 64, 128, 256, 512) for b in (16, 32, 64) for w in (1e-4, 1e-3, 1e-2, 1e-1)
    }


def test_no_network_is_trained_longer_than_another() -> None:
    for problem in PROBLEMS.values():
        assert len({sum(phases(problem, method)) for method in METHODS}) == 1


def test_the_commands_search_retrain_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "uci", lambda name, folder: blobs(150, 4, 21))
    out = tmp_path / "quick"
    chosen = out / "chosen.json"
    common = ["car", "car", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(search, "HIDDEN", [8, 4])
    monkeypatch.setattr(search, "BATCH_SIZES", [64])
    search.main(common)
    common += ["--chosen", str(chosen)]
    settings = json.loads(chosen.read_text())["car"]
    assert set(settings) == {"NN (best)", "NN (equivalent)", "CPNA"}
    assert settings["NN (best)"]["hidden"] in (8, 4)
    assert len(load_rows(out / "search_grid.csv")) == 2 * 4 * 5
    command.main([*common, "--methods", *METHODS])
    rows = load_rows(out / "table3.csv")
    assert load_rows(out / "table3.parquet") == rows
    assert len(rows) == len(METHODS) * 2 * 2
    assert {row["seed"] for row in rows} == {10, 11}
    by_method = {row["method"]: row for row in rows}
    assert by_method["NN (equivalent)"]["live_input"] + by_method["NN (equivalent)"]["live_hidden"] == 150
    assert by_method["nodes"]["effective_input"] == 126
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    command.main([*common, "--methods", *METHODS])
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()} == before


def test_data_that_are_not_there_are_missed_before_anything_is_trained(tmp_path: Path) -> None:
    for run in (command.main, search.main):
        with pytest.raises(SystemExit, match=r"error: isolet: .*uci.*--data.*does not have this file"):
            run(["isolet", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_sets_are_split_as_often_as_the_page_says() -> None:
    settings = command.parse(["car", "isolet", "--methods", "CPNA", "--protocol", "paper"]).settings
    assert [(s["set"], s["seeds"]) for s in settings] == [
        ("car", list(range(10, 20))),
        ("car", list(range(20, 30))),
        ("isolet", list(range(10, 20))),
    ]


def test_what_was_not_searched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["car", "--chosen", str(tmp_path / "none.json")])
    assert "has nothing for NN (best) on car, NN (equivalent) on car, CPNA on car; " in capsys.readouterr().err
    partly = tmp_path / "chosen.json"
    partly.write_text(json.dumps({"car": {"CPNA": {}}}))
    with pytest.raises(SystemExit):
        command.parse(["car", "--methods", "CPA", "NN (best)", "--chosen", str(partly)])
    assert "has nothing for NN (best) on car; python -m examples.uci.search writes it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search.main(["car", "--stages", "rates", "--out", str(tmp_path)])
    assert "--stages: rates comes after grid, which" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.parse(["iris"])
    with pytest.raises(SystemExit):
        search.main(["iris"])
    assert "invalid choice: 'iris'" in capsys.readouterr().err


def test_tables_are_of_hand_made_rows() -> None:
    counts = {"live_input": 120, "live_hidden": 32, "effective_input": 119, "effective_hidden": 30}
    rows = [
        {"set": "car", "method": method, "protocol": "paper", "seed": seed, "best": 0.0, "final": final, **counts}
        for method, finals in (("CPNA", (99.0, 97.0)), ("NN (equivalent)", (98.0, 92.0)))
        for seed, final in enumerate(finals)
    ]
    text = table3(rows)
    assert "| Car Evaluation | CPNA | 120 + 32 | 119 + 30 | 100.00 ± 0.00 | 0.00 ± 0.00 | 98.00 ± 1.41 |  |" in text
    spread = np.std([1, 5], ddof=1) / 2**0.5
    assert f"| Car Evaluation | NN (equivalent) | 2 | +0.00 ± 0.00 | +3.00 ± {spread:.2f} |  |" in differences(rows)


def test_the_tables_of_the_page_are_made_from_the_committed_results() -> None:
    page = (RESULTS.parents[2] / "RESULTS.md").read_text()
    rows = load_rows(RESULTS / "table3.csv")
    assert fill(page, "examples.uci", f"{table3(rows)}\n\n{differences(rows)}") == page


def test_what_is_chosen_is_what_the_committed_search_found() -> None:
    chosen = json.loads((RESULTS / "chosen.json").read_text())
    for name in PROBLEMS:
        found: dict[str, search.Choice] = {}
        for stage in search.STAGES:
            rows = [row for row in load_rows(RESULTS / f"search_{stage}.csv") if row["set"] == name]
            found = search.choose(stage, rows, found)
        assert found == chosen[name]
