"""The saliency example: its data, its choices and its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")

from examples.data import DATA_VARIABLE, digits, fetch, loader, mnist
from examples.results import mean_and_spread
from examples.saliency.__main__ import main, parse
from examples.saliency.experiments import UnitRemover
from examples.saliency.figures import stops
from examples.saliency.training import Classifier, accuracy


def test_digits_are_split_without_overlap_and_stratified() -> None:
    data = digits(3)
    sizes = [len(split.y) for split in data]
    assert sizes == [987, 270, 540]
    rows = torch.cat([split.x for split in data])
    assert len(rows.unique(dim=0)) == 1797  # no two digits are equal, so none is in two splits
    for split in data:
        counts = split.y.bincount()
        assert counts.min() > 0.08 * len(split.y)
    assert float(data.train.x.min()) == 0.0
    assert float(data.train.x.max()) == 1.0


def test_mnist_is_the_published_one() -> None:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("MNIST is not there: LIGHTNING_CPNA_DATA names no folder with mnist/")
    data = mnist(0)
    assert [split.x.shape for split in data] == [(50_000, 784), (10_000, 784), (10_000, 784)]
    assert data.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.cat([data.train.y, data.validation.y]).bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    both = torch.cat([data.train.x, data.validation.x])
    assert abs(float(both.mean())) < 1e-4
    assert float(both.std()) == pytest.approx(1.0, abs=1e-4)
    other = mnist(1)
    assert not torch.equal(other.train.y, data.train.y)
    assert torch.equal(other.test.x, data.test.x)


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images.*--data, LIGHTNING_CPNA_DATA"):
        fetch("mnist/train-images-idx3-ubyte.gz", "https://example.invalid/", tmp_path, "0" * 64)


def test_batches_are_shuffled_by_the_seed_and_all_of_one_size() -> None:
    data = digits(0).train
    epoch = list(loader(data, 100, seed=1))
    assert [len(y) for _, y in epoch] == [100] * 9
    again = list(loader(data, 100, seed=1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epoch, again, strict=True))
    [(x, y)] = list(loader(data))
    assert torch.equal(x, data.x)
    assert torch.equal(y, data.y)


@pytest.mark.parametrize("replace", ["zero", "mean"])
def test_the_remover_keeps_so_many_units_of_a_copy(replace: str) -> None:
    data = digits(0)
    module = Classifier((64, 20, 12, 10))
    remover = UnitRemover(module, data, "norm", 0)
    assert remover.n_units == 32
    for n in (30, 7, 9):
        remover.keep(n, replace)
    left = [int(remover.module.get_parameter(name).any(1).sum()) for name in module.hidden]
    assert sum(left) == 7
    assert min(left) >= 1
    assert all(bool(module.get_parameter(name).all(1).all()) for name in module.hidden)
    assert 0 <= accuracy(remover.module, data.test) <= 100


def test_the_stop_is_chosen_on_validation_alone() -> None:
    rows = [
        {
            "seed": 0,
            "score": "norm",
            "validation_accuracy": v,
            "test_accuracy": t,
            "parameters": p,
            "dense_parameters": 100,
        }
        for v, t, p in [(98.0, 97.0, 100), (97.9, 96.0, 50), (97.0, 99.0, 30), (97.7, 95.0, 20), (97.6, 98.0, 10)]
    ]
    [stop] = stops(rows)
    assert (stop["parameters"], stop["times_smaller"], stop["lost"]) == (20, 5.0, 2.0)


def test_means_and_spreads_are_those_of_the_groups() -> None:
    rows = [{"kind": "a", "x": 1.0}, {"kind": "a", "x": 3.0}, {"kind": "b", "x": 5.0}]
    assert mean_and_spread(rows, ("kind",), "x") == {("a",): (2.0, pytest.approx(2**0.5)), ("b",): (5.0, 0.0)}


def test_the_command_writes_results_and_a_table(tmp_path: Path) -> None:
    main(["--experiments", "removable", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "removable.json").read_text())
    assert len(rows) == 18
    assert all(0 <= row["removable"] < 128 for row in rows)
    assert (tmp_path / "removable.md").read_text().startswith("| score | set to zero | replaced by their mean |")


def test_a_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--seeds", "0"])
    assert "argument --seeds: 0 is too small" in capsys.readouterr().err
