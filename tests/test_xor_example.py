"""The XOR example's data, recipes and command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("joblib", reason="the extra 'examples' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from examples.xor import training
from examples.xor.__main__ import main, parse
from examples.xor.problem import Phase, PhaseBatches, XORData, XORNet
from examples.xor.recipes import METHODS, PROBLEMS, callbacks, recipe
from examples.xor.training import Job, train
from lightning_cpna.sweeps import load_rows
from tests.helpers import tensorboard


def test_labels_agree_with_the_signs_of_the_first_coordinates() -> None:
    data = XORData(3, 8, 500, torch.Generator().manual_seed(0))
    negative = (data.x[:, :3] < 0).sum(1)
    assert torch.equal(data.y, (negative % 2 == 0).float())
    assert float(data.x.abs().max()) <= 1.0
    assert 0.4 < float(data.y.mean()) < 0.6


def test_a_phase_gives_every_sample_once_an_epoch() -> None:
    batches = PhaseBatches(10, [Phase(2, 4), Phase(1, None)], torch.Generator().manual_seed(0))
    drawn = list(batches)
    assert len(drawn) == len(batches) == 7
    assert sorted(torch.cat(drawn[:3]).tolist()) == sorted(torch.cat(drawn[3:6]).tolist()) == list(range(10))
    assert drawn[6] == slice(None)


@pytest.mark.parametrize("k", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_ends_at_the_papers_counts(k: int, method: str) -> None:
    last: dict[str, int | float] = {}
    end: float = 0
    for callback in callbacks(recipe(k, method), 3000):
        assert callback.schedule.start >= end, "stages overlap"  # type: ignore[union-attr]
        end = callback.schedule.window_end()  # type: ignore[union-attr]
        if callback.granularity == "connection":
            last.update(callback.targets)
    wanted = {"net.2.weight": PROBLEMS[k].n_hidden, "net.0.weight": PROBLEMS[k].n_inputs}
    assert last == {name: wanted[name] for name in last}
    assert len(last) == {"nn": 0, "cpa_hidden": 1, "cpna_hidden": 1}.get(method, 2)
    assert end <= sum(phase.steps(3000) for phase, _ in recipe(k, method))


def test_the_command_writes_results_figures_and_tensorboard_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--n", "60", "--p", "6", "--hidden", "64", "--seeds", "1", "--first-seed", "5", "--jobs", "1"]
    main([*arguments, "--methods", "nn", "fsa_cpna", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "results.json").read_text())
    assert [(run["k"], run["p"], run["n"], run["method"], run["seed"]) for run in runs] == [
        (3, 6, 60, "nn", 5),
        (3, 6, 60, "fsa_cpna", 5),
    ]
    assert runs[0]["connections"] == {"net.0.weight": 384, "net.2.weight": 64}
    assert runs[1]["connections"] == {"net.0.weight": 24, "net.2.weight": 12}
    assert runs[1]["live_features"] == 3
    assert all(0 <= run["test_auc"] <= 100 and run["seconds"] > 0 for run in runs)
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {"3d_p6_training.png", "3d_p6_connections.png", "3d_p6_connectivity_fsa_cpna.png"}
    curves = [row for row in load_rows(tmp_path / "3d_p6_training.csv") if row["method"] == "fsa_cpna"]
    assert curves[-1]["auc/test"] == pytest.approx(runs[1]["test_auc"] / 100, abs=1e-4)
    assert (curves[-1]["connections/input"], curves[0]["connections/hidden"]) == (24, 64)
    ask, run = tensorboard(tmp_path / "tensorboard"), "3d_p6_fsa_cpna/seed_5"
    scalars = ask("scalars/tags")
    assert set(scalars) == {"3d_p6_nn/seed_5", run}
    assert {"auc/test", "auc/train", "loss/test", "hidden/connections", "input/at_target"} <= set(scalars[run])
    last = {tag: ask(f"scalars/scalars?tag={tag}&run={run}")[-1][2] for tag in ("auc/test", "input/connections")}
    assert last["auc/test"] == pytest.approx(runs[1]["test_auc"] / 100, abs=1e-4)
    assert last["input/connections"] == 24
    assert list(ask("images/tags")[run]) == ["feature/connectivity"]
    picture = ask(f"images/images?tag=feature/connectivity&run={run}&sample=0")[0]
    assert ask(f"images/individualImage?{picture['query']}").startswith(b"\x89PNG")
    experiment = ask("hparams/experiment", {})
    assert {"k", "p", "n", "hidden", "method", "seed"} == {info["name"] for info in experiment["hparamInfos"]}
    assert {"final/auc_test", "final/auc_train"} == {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert "FSA + CPNA" in capsys.readouterr().out


@pytest.mark.parametrize("bound", ["ACCEPTED_FEATURES", "ACCEPTED_END"])
def test_a_run_that_does_not_learn_its_training_set_starts_anew_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    starts: list[tuple[Tensor, Tensor]] = []

    class Spied(XORNet):
        def on_fit_start(self) -> None:
            starts.append((self.trainer.datamodule.train.x, self.net[0].weight.detach().clone()))  # type: ignore

    monkeypatch.setattr(training, "XORNet", Spied)
    job, board = Job(3, 6, 60, 64, "fsa_cpna", 5), tmp_path / "tensorboard" / "3d_p6_fsa_cpna"
    first = train(job, tmp_path / "tensorboard")
    monkeypatch.setattr(training, bound, 1.01)
    monkeypatch.setattr(training, "MAX_TRIES", 2)
    stale = [board / "seed_5" / "stale", board / "seed_5_failed_1" / "stale", board / "seed_50" / "kept"]
    for file in stale:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    again = train(job, tmp_path / "tensorboard")
    assert (first.tries, again.tries) == (1, 2)
    assert again.connections == {"net.0.weight": 24, "net.2.weight": 12}, "the last try is not judged"
    assert all(torch.equal(x, starts[0][0]) for x, _ in starts)
    for x, weight in starts:
        cosines = torch.nn.functional.cosine_similarity(weight[:, None], x, dim=2)  # (unit, sample)
        assert float(cosines.abs().max()) < 0.9999, "a unit begins as a sample"
    assert torch.equal(starts[0][1], starts[1][1])
    assert not torch.equal(starts[1][1], starts[2][1])
    assert {folder.name for folder in board.iterdir()} == {"seed_5", "seed_5_failed_1", "seed_50"}
    assert [file.exists() for file in stale] == [False, False, True], "what a killed run left is removed, and no more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: 0 is too small; allowed is 1 or more"),
        (["--k", "5", "--p", "4"], "--p: 4 is less than k; allowed is 5 or more"),
        (["--methods", "svm"], "invalid choice: 'svm'"),
    ],
)
def test_a_bad_flag_is_refused_by_name(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
