"""Searches for features: against data whose features are known, noise, closed forms, and undisturbed searches."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("scipy", reason="the extra 'search' is not installed")
pytest.importorskip("joblib", reason="the extra 'search' is not installed")

from lightning_cpna import Found, Tries, find_features
from lightning_cpna import search as search_module
from lightning_cpna.search import _certificate, _first_weight

P, N = 12, 400
QUICK = Tries(8, 8, together=4, null=6, pretraining=6, annealing=12, refit=4, batch_size=100)
TRAINER = partial(pl.Trainer, accelerator="cpu")


class Net(pl.LightningModule):
    def __init__(self, n_features: int, norm: bool = False) -> None:
        super().__init__()
        first: list[nn.Module] = [nn.BatchNorm1d(n_features)] if norm else []
        self.net = nn.Sequential(*first, nn.Linear(n_features, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).squeeze(-1)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-2, weight_decay=1e-3)


class LightningNet(L.LightningModule):
    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_features, 64), nn.ReLU(), nn.Linear(64, 1))

    forward = Net.forward
    training_step = Net.training_step
    configure_optimizers = Net.configure_optimizers


def xor(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(N, P, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, (x[:, 3] * x[:, 7] > 0).float()


def search(
    x: Tensor,
    y: Tensor,
    n_features: Any = 2,
    tries: Tries = QUICK,
    network: Callable[[int], Any] = Net,
    trainer: Any = TRAINER,
    **options: Any,
) -> Found:
    return find_features(
        network, trainer, x, y, n_features, tries=tries, console=Console(file=io.StringIO()), **options
    )


def test_the_two_features_that_matter_only_together_are_found_and_certified() -> None:
    x, y = xor()
    found = search(x, y)
    assert found.features == (3, 7)
    assert found.certificate.holds
    assert found.certificate.margin > 20
    assert ((found.network(x[:, [3, 7]]) > 0) == (y > 0)).float().mean() > 0.9
    assert type(found.network) is Net
    assert "2 features" in str(found)
    assert "certified: [3, 7]" in str(found)


def test_nothing_is_certified_where_labels_are_noise() -> None:
    for seed in range(3):
        x, _ = xor(seed)
        found = search(x, torch.rand(N, generator=torch.Generator().manual_seed(seed)).round(), seed=seed)
        assert not found.certificate.holds
        assert found.tries == QUICK.n
        assert "NOT certified" in str(found)


def test_the_limit_is_the_prediction_limit_of_a_table_of_students_t() -> None:
    # t at .01 with 3 degrees of freedom is 4.541; the losses have mean 2.5 and standard deviation 1.29099.
    found = _certificate(0.0, [1.0, 2.0, 3.0, 4.0], 0.01)
    assert found.limit == pytest.approx(2.5 - 4.541 * 1.29099 * 1.25**0.5, abs=2e-3)
    assert found.margin == pytest.approx(2.5 / 1.29099, abs=1e-4)


def test_a_certificate_is_false_as_often_as_its_level_says() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(5000, 7, generator=generator).tolist()
    false = sum(_certificate(loss, null, 0.05).holds for loss, *null in draws)
    assert false / len(draws) == pytest.approx(0.05, abs=0.01)  # three standard errors


def test_losses_without_spread_certify_nothing() -> None:
    assert not _certificate(0.0, [0.0] * 4, 0.01).holds
    assert _certificate(0.0, [0.0] * 4, 0.01).margin == 0


@pytest.mark.parametrize("trainer", [pl.Trainer, partial(pl.Trainer, accelerator="cpu")])
def test_a_search_says_the_same_again(trainer: Any) -> None:
    first, second = (search(*xor(), trainer=trainer) for _ in range(2))
    assert first.rows == second.rows
    assert torch.equal(first.network(xor()[0][:, [3, 7]]), second.network(xor()[0][:, [3, 7]]))
    assert search(*xor(), seed=1).rows != first.rows


def test_a_search_of_the_other_lightning() -> None:
    assert search(*xor(), network=LightningNet, trainer=partial(L.Trainer, accelerator="cpu")).features == (3, 7)


def test_features_that_are_dropped_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (part.double() for part in xor())
    network = lambda n: Net(n).double()  # noqa: E731
    dropped = search(x, y, network=network)
    monkeypatch.setattr(search_module, "_first_weight", lambda *given: (_first_weight(*given)[0], False))
    kept = search(x, y, network=network)
    for ours, theirs in zip(dropped.rows, kept.rows, strict=True):
        assert ours["features"] == theirs["features"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-9)


def test_a_network_that_reads_features_in_two_places_keeps_them_all() -> None:
    x, y = xor()
    assert _first_weight(Net(8), x[:4, :8]) == ("net.0.weight", True)
    assert _first_weight(Net(8, norm=True), x[:4, :8]) == ("net.1.weight", False)
    assert search(x, y, network=partial(Net, norm=True)).features == (3, 7)


def test_of_several_counts_the_margin_decides_and_fewer_features_are_among_more() -> None:
    found = search(*xor(), n_features=[1, 2, 4])
    assert [row["count"] for row in found.rows[:3]] == [4, 2, 1]
    for four, two, one in zip(found.rows[::3], found.rows[1::3], found.rows[2::3], strict=True):
        assert set(four["features"]) > set(two["features"]) > set(one["features"])
        assert (len(four["features"]), len(two["features"]), len(one["features"])) == (4, 2, 1)
    assert found.features == (3, 7)


def test_what_is_found_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    x, y = xor(3)[0], torch.rand(N).round()
    alone, together = search(x, y), search(x, y, n_jobs=2, folder=tmp_path)
    assert alone.rows == together.rows
    assert alone.certificate == together.certificate


def test_a_search_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    x, y = xor(3)[0], torch.rand(N).round()
    straight = search(x, y, folder=tmp_path)
    files = sorted(tmp_path.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == QUICK.n // QUICK.together
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    assert search(x, y, folder=tmp_path).rows == straight.rows
    assert files[0].stat().st_mtime_ns == kept, "what was finished is not run again"


def test_searches_for_something_else_share_no_files(tmp_path: Path) -> None:
    x, y = xor()
    once = Tries(1, 8, together=1, null=4, pretraining=1, annealing=2, refit=1)
    others: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"n_features": 3}, {"y": 1 - y}, {"x": -x}, {"tries": Tries(**{**vars(once), "null": 5})},
    ]  # fmt: skip
    for n, other in enumerate(others):
        search(**{"x": x, "y": y, "tries": once, "folder": tmp_path, **other})
        assert len(list(tmp_path.glob("*.json"))) == n + 1


def test_subsets_are_used_in_turn_each_with_tries_on_permuted_labels() -> None:
    tries = Tries(3, None, together=1, null=4, pretraining=1, annealing=2, refit=1)
    found = search(xor()[0], torch.rand(N).round(), tries=tries)
    assert [row["subset"] for row in found.rows if not row["is_null"]] == [12, 9, 6]
    assert [sum(row["is_null"] for row in found.rows if row["subset"] == m) for m in (12, 9, 6)] == [4, 4, 4]


class TwoReaders(Net):
    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.skip = nn.Linear(n_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x) + self.skip(x).squeeze(-1)
        return logits


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "x": (lambda x, y: search(x[0], y), r"x has shape \(12,\)"),
    "integers": (lambda x, y: search(x.long(), y), r"x has shape .* torch.int64; allowed are floats"),
    "y": (lambda x, y: search(x, y[:5]), r"y has shape \(5,\); allowed is one label for each of the 400 rows"),
    "all features": (lambda x, y: search(x, y, 12), r"n_features is \[12\]; allowed are 1 to 11"),
    "no feature": (lambda x, y: search(x, y, []), r"n_features is \[\]"),
    "a large subset": (lambda x, y: search(x, y, tries=Tries(subset=13)), "subset is 13; allowed is more than the 2"),
    "a small subset": (lambda x, y: search(x, y, tries=Tries(subset=[8, 2])), r"subset is \[8, 2\]"),
    "two readers": (lambda x, y: search(x, y, network=TwoReaders), "net.0.weight, skip.weight read the features"),
    "tries": (lambda x, y: Tries(0), "n is 0; allowed is an int >= 1"),
    "null": (lambda x, y: Tries(null=3), "null is 3; allowed is an int >= 4"),
    "level": (lambda x, y: Tries(level=1.0), r"level is 1.0; allowed is a float in \(0, 1\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(*xor())
