"""Searches for features: against data whose features are known, noise, closed forms, and undisturbed searches."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("joblib", reason="the extra 'sweeps' is not installed")

from lightning_cpna import Found, Restarts, find_features, member, stack
from lightning_cpna import search as search_module
from lightning_cpna.member_batches import mixed_seed
from lightning_cpna.search import _Examples
from lightning_cpna.search_inputs import first_weight
from tests.helpers import on_every_device

pd = pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")
P, N = 12, 400
QUICK = Restarts(8, 8, together=4, pretraining=6, annealing=12, refit=8, batch_size=80)
ONCE = Restarts(1, 8, together=1, pretraining=1, annealing=4, refit=1)
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
    x: Any,
    y: Any,
    n_features: Any = 2,
    restarts: Restarts = QUICK,
    network: Callable[[int], Any] = Net,
    trainer: Any = TRAINER,
    **options: Any,
) -> Found:
    return find_features(
        network, trainer, x, y, n_features, restarts=restarts, console=Console(file=io.StringIO()), **options
    )


def noise(seed: int = 3) -> tuple[Tensor, Tensor]:
    x, y = xor(seed)
    return x, y[torch.randperm(N, generator=torch.Generator().manual_seed(seed))]


def test_examples_are_put_where_the_network_is() -> None:
    module = Net(2).to("meta")
    loader = SimpleNamespace(dataset=SimpleNamespace(tensors=[torch.rand(3, 2), torch.rand(3)]))
    trainer: Any = SimpleNamespace(train_dataloader=loader)
    _Examples().on_train_start(trainer, module)
    assert [tensor.device.type for tensor in loader.dataset.tensors] == ["meta", "meta"]


@on_every_device
def test_the_two_features_that_matter_only_together_are_found_and_certified(device: str) -> None:
    x, y = xor()
    places = set[str]()

    class Where(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            places.update(tensor.device.type for tensor in trainer.train_dataloader.dataset.tensors)

    def make(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
        return pl.Trainer(accelerator=device, callbacks=[*callbacks, Where()], **options)

    found = search(x, y, trainer=make)
    assert places == {device}, "examples lie where the network is, in the refit, too"
    assert found.features == (3, 7)
    assert found.certificate.holds
    assert found.certificate.margin > 10
    assert ((found.network(x[:, [3, 7]]) > 0) == (y > 0)).float().mean() > 0.9
    assert type(found.network) is Net
    assert not found.network.training
    assert "tries: [3, 7]" in str(found)
    assert "labels depend on some of them" in str(found)


def test_nothing_is_certified_where_labels_are_noise() -> None:
    found = search(*noise())
    assert not found.certificate.holds
    assert found.n_tries == QUICK.n
    assert "nothing is certain after 8 tries" in str(found)


class Lucky(Net):
    """A network of which few tries learn noise by heart, while most do not learn."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-2, weight_decay=3e-2)


def test_noise_that_few_tries_learn_by_heart_is_certified_as_often_as_the_level_says() -> None:
    plan = Restarts(4, 10, together=4, pretraining=10, annealing=10, refit=1, batch_size=20, level=0.2)
    false = 0
    for seed in range(25):
        x, y = noise(seed)
        false += search(x[:60], y[:60], 5, restarts=plan, network=Lucky, seed=seed).certificate.holds
    assert false <= 12, "more than 12 of 25 have a probability of 0.0004"


def test_the_held_out_loss_is_that_of_examples_which_no_try_has_seen() -> None:
    x, y = xor()
    lost = x.clone()
    plan = search_module._Search(Net, TRAINER, x, y, "net.0.weight", True, (2,), QUICK, 0, "")
    fitted, held, labels, which = plan.parts()
    assert len(held) == N // 5
    assert torch.equal(torch.cat([fitted, held]).sort().values, torch.arange(N))
    assert torch.equal(labels[which], y[held])
    lost[held] = torch.nan  # whoever is trained on these learns nothing
    rows = search_module._Search(Net, TRAINER, lost, y, "net.0.weight", True, (2,), QUICK, 0, "").run(0, 8, 4)
    assert [row["features"] for row in rows] == [row["features"] for row in plan.run(0, 8, 4)]


def test_the_losses_are_those_of_the_networks_that_are_left() -> None:
    x, y = (part.double() for part in xor())
    plan = search_module._Search(lambda n: Net(n).double(), TRAINER, x, y, "net.0.weight", False, (2,), QUICK, 0, "")
    kept: list[Any] = []

    def remember(*given: Any) -> Any:
        kept.append(stack(*given))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "stack", remember)
        rows = plan.run(0, 8, 4)
    held = plan.parts().held
    for place, row in enumerate(rows):
        columns = torch.randperm(P, generator=torch.Generator().manual_seed(mixed_seed(0, 0, place, 0)))
        net = member(kept[0], place)
        with torch.no_grad():
            logits = net(x[held][:, columns[:8].sort().values])
            for label in (0.0, 1.0):
                expected = nn.functional.binary_cross_entropy_with_logits(
                    logits, torch.full_like(logits, label), reduction="none"
                )
                found = torch.tensor([example[int(label)] for example in row["losses"]], dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert row["loss"] == pytest.approx(float(nn.functional.binary_cross_entropy_with_logits(logits, y[held])))


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
    monkeypatch.setattr(search_module, "first_weight", lambda *given: (first_weight(*given)[0], False))
    kept = search(x, y, network=network)
    for ours, theirs in zip(dropped.rows, kept.rows, strict=True):
        assert ours["features"] == theirs["features"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-9)


def test_a_network_that_reads_features_in_two_places_keeps_them_all() -> None:
    x, y = xor()
    assert first_weight(Net(8), x[:4, :8], y[:4]) == ("net.0.weight", True)
    assert first_weight(Net(8, norm=True), x[:4, :8], y[:4]) == ("net.1.weight", False)
    assert search(x, y, network=partial(Net, norm=True)).features == (3, 7)


class Penalized(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 1e-3 * self.get_parameter("net.0.weight").abs().mean()


class Reconstructs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rebuilt: Tensor = batch[0] - self.get_parameter("net.0.bias")[:8]
        return super().training_step(batch, batch_idx) + rebuilt.square().mean()


class AsksItsTrainer(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0 * self.trainer.current_epoch)


@pytest.mark.parametrize("kind", [Penalized, Reconstructs, AsksItsTrainer])
def test_a_network_whose_loss_asks_for_the_features_keeps_them_all(kind: type[Net]) -> None:
    x, y = xor()
    assert first_weight(kind(8), x[:4, :8], y[:4]) == ("net.0.weight", False)


class Classes(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return nn.functional.cross_entropy(torch.stack([-logits, logits], dim=-1), batch[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_classes_may_be_ints_of_any_size(dtype: torch.dtype) -> None:
    x, y = xor()
    expected = search(x, y.long(), restarts=ONCE, network=Classes)
    assert search(x, y.to(dtype), restarts=ONCE, network=Classes).rows == expected.rows


@pytest.mark.parametrize("n", [161, 201])  # one more than two batches for the refit, and for the tries
def test_a_last_batch_of_one_does_not_stop_batchnorm(n: int) -> None:
    x, y = xor()
    found = search(x[:n], y[:n], restarts=replace(ONCE, level=0.5), network=partial(Net, norm=True))
    assert len(found.features) == 2


class WithMore(Net):
    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.register_buffer("scale", torch.ones(n_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.get_buffer("scale"))

    def get_extra_state(self) -> dict[str, int]:
        return {"release": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"release": 1}


@pytest.mark.parametrize("network", [Net, WithMore])
def test_the_network_reads_what_was_searched_whatever_the_trainers_precision(network: type[Net]) -> None:
    x, y = xor()
    found = search(x, y, restarts=ONCE, network=network, trainer=partial(TRAINER, precision="64-true"))
    assert found.network(x[:, list(found.features)]).dtype == torch.float32


def test_of_several_counts_the_held_out_loss_decides_and_fewer_features_are_among_more() -> None:
    found = search(*xor(), n_features=[1, 2, 4])
    assert [row["count"] for row in found.rows[:3]] == [4, 2, 1]
    for four, two, one in zip(found.rows[::3], found.rows[1::3], found.rows[2::3], strict=True):
        assert set(four["features"]) > set(two["features"]) > set(one["features"])
        assert (len(four["features"]), len(two["features"]), len(one["features"])) == (4, 2, 1)
    assert found.features == tuple(min(found.rows, key=lambda row: row["loss"])["features"])
    assert {3, 7} <= set(found.features)


def test_what_is_found_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone, together = search(*noise()), search(*noise(), n_jobs=2, folder=tmp_path)
    assert alone.rows == together.rows
    assert alone.certificate == together.certificate


def test_a_search_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    straight = search(*noise(), folder=tmp_path)
    files = sorted(tmp_path.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == QUICK.n_stacks == 2
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    again = search(*noise(), folder=tmp_path)
    assert (again.rows, again.certificate) == (straight.rows, straight.certificate)
    assert files[0].stat().st_mtime_ns == kept, "what was finished is not run again"


def test_searches_for_something_else_share_no_files(tmp_path: Path) -> None:
    x, y = xor()
    others: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"n_features": 3}, {"y": 1 - y}, {"x": -x}, {"restarts": replace(ONCE, held_out=0.3)},
    ]  # fmt: skip
    for n, other in enumerate(others):
        search(**{"x": x, "y": y, "restarts": ONCE, "folder": tmp_path, **other})
        assert len(list(tmp_path.glob("*.json"))) == n + 1


def test_a_level_or_a_budget_that_is_changed_takes_the_tries_that_are_there(tmp_path: Path) -> None:
    search(*noise(), restarts=ONCE, folder=tmp_path)
    search(*noise(), restarts=replace(ONCE, level=0.002, n=2), folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_subsets_are_used_in_turn() -> None:
    found = search(*noise(), restarts=replace(ONCE, n=3, subset=[1.0, 9, 0.5]))
    assert [row["subset"] for row in found.rows] == [12, 9, 6]


class Acts(Net):
    """A network with attributes that are functions, or that no attribute tells."""

    def __init__(self, n_features: int, act: Callable[[Tensor], Tensor] = torch.relu, lr: float = 0.1) -> None:
        super().__init__(n_features)
        self.act, self._lr = act, lr

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net[2](self.act(self.net[0](x))).squeeze(-1)
        return logits


class Regression(Net):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": nn.functional.mse_loss(self(batch[0]), batch[1])}


def test_a_product_of_two_features_is_found_by_regression() -> None:
    x, _ = xor()
    found = search(x, x[:, 3] * x[:, 7], network=Regression)
    assert found.features == (3, 7)
    assert found.certificate.holds


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"accumulate_grad_batches": 2}]
)
def test_a_trainer_of_another_kind_reaches_the_counts(options: dict[str, Any]) -> None:
    found = search(*xor(), trainer=partial(pl.Trainer, accelerator="cpu", **options))
    assert all(len(row["features"]) == 2 for row in found.rows)
    assert found.features == (3, 7)


def test_a_table_gives_names_and_takes_whole_numbers_and_bools() -> None:
    x, y = xor()
    table = pd.DataFrame(x.numpy(), columns=list("abcdefghijkl")).assign(a=range(N), b=lambda table: table.c > 0)
    table["a"] = (table["a"] - table["a"].mean()) / table["a"].std()
    found = search(table, pd.Series(y.numpy()))
    assert (found.features, found.names) == ((3, 7), ("d", "h"))
    assert "tries: ['d', 'h']" in str(found)
    assert search(x, y, restarts=ONCE).names is None
    whole = (100 * x).round()
    assert search(whole.long(), y, restarts=ONCE).rows == search(whole, y, restarts=ONCE).rows


@pytest.mark.parametrize("kind", ["array", "frame", "double"])
def test_arrays_and_tables_are_searched_as_tensors_of_the_networks_type(kind: str) -> None:
    pandas = pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")
    x, y = xor()
    given: dict[str, tuple[Any, Any]] = {
        "array": (x.numpy(), y.numpy()),
        "frame": (pandas.DataFrame(x.double().numpy()), pandas.Series(y.double().numpy())),
        "double": (x.double(), y.double()),
    }
    assert search(*given[kind]).rows == search(x, y).rows


def test_a_table_whose_type_has_missing_values_is_searched_as_any_other() -> None:
    x, y = xor()
    table = pd.DataFrame(x.double().numpy()).astype("Float64").assign(count=range(N)).convert_dtypes()
    same = pd.DataFrame(x.double().numpy()).assign(count=range(N))
    with pytest.warns(UserWarning, match="scale the columns alike"):
        assert search(table, y, restarts=ONCE).rows == search(same, y, restarts=ONCE).rows
    table.iloc[5, 3] = pd.NA
    with pytest.raises(ValueError, match=r"x has values that are not finite in columns \[3\]"):
        search(table, y)


def test_columns_of_other_scales_are_warned_of() -> None:
    x, y = xor()
    for other in (x * torch.logspace(-1, 1, P), x + 100):
        with pytest.warns(UserWarning, match="scale the columns alike first"):
            search(other, y, restarts=ONCE)


def test_what_a_network_cannot_do_is_said_by_the_network() -> None:
    x, y = xor()
    with pytest.raises(RuntimeError, match="can't be cast") as raised:
        search(x, y.long())
    assert "with x (4, 8) torch.float32 and y (4,) torch.int64; batches have" in raised.value.__notes__[0]


def test_a_network_that_does_not_ask_how_many_features_there_are_says_so() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        search(*xor(), network=lambda n: Net(8))
    assert "with x (4, 2) torch.float32" in raised.value.__notes__[0]


def test_a_training_step_may_ask_its_trainer() -> None:
    class WarmsUp(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            n_epochs = self.trainer.max_epochs or 1
            return super().training_step(batch, batch_idx) * min(1.0, (self.current_epoch + 1) / n_epochs)

    assert len(search(*xor(), network=WarmsUp, restarts=ONCE).rows) == 1


def test_a_search_that_is_stopped_says_what_is_kept(tmp_path: Path) -> None:
    class Stopped(pl.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            if stop and len(list(tmp_path.glob("*.json"))) == 1:
                raise KeyboardInterrupt

    def make(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
        return pl.Trainer(accelerator="cpu", callbacks=[*callbacks, Stopped()], **options)

    handler, stop, screen = signal.getsignal(signal.SIGINT), True, io.StringIO()
    options: dict[str, Any] = {"restarts": QUICK, "folder": tmp_path, "console": Console(file=screen, width=300)}
    with pytest.raises(SystemExit):
        find_features(Net, make, *noise(), 2, **options)
    signal.signal(signal.SIGINT, handler)  # which Lightning has taken away
    assert f"complete are kept in {tmp_path}, and the same call goes on" in screen.getvalue()
    stop = False
    assert find_features(Net, make, *noise(), 2, **options).rows == search(*noise()).rows


def test_a_trainer_that_leaves_out_the_callbacks_is_named() -> None:
    with pytest.raises(RuntimeError, match="trainer: it left out its argument callbacks"):
        search(*xor(), trainer=lambda callbacks, **options: TRAINER(**options))


class Squeezes(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).squeeze()
        return logits


def test_a_network_that_cannot_do_with_one_example_says_so_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Target size") as raised:
        search(*xor(), network=Squeezes, folder=tmp_path)
    assert "with x (1, 8) torch.float32 and y (1,) torch.float32;" in raised.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_another_network_in_the_same_folder_is_another_search(tmp_path: Path) -> None:
    class Other(Net):
        pass

    networks: list[Callable[[int], Any]] = [
        Net, Other, partial(Net, norm=True), Acts, partial(Acts, act=torch.sin), partial(Acts, lr=1.0),
        partial(Acts, act=lambda x: x.sin()), partial(Acts, act=lambda x: x.cos()),
    ]  # fmt: skip
    for n, network in enumerate(networks):
        search(*xor(), restarts=ONCE, network=network, folder=tmp_path)
        assert len(list(tmp_path.glob("*.json"))) == n + 1


class Weighted(Net):
    WEIGHT = 1.0

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.register_buffer("weight", torch.tensor(Weighted.WEIGHT))


def test_a_network_with_another_number_in_a_buffer_is_another_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, weight in enumerate((1.0, 2.0)):
        monkeypatch.setattr(Weighted, "WEIGHT", weight)
        search(*xor(), restarts=ONCE, network=Weighted, folder=tmp_path)
        assert len(list(tmp_path.glob("*.json"))) == n + 1


def test_another_trainer_in_the_same_folder_is_another_search(tmp_path: Path) -> None:
    trainers: list[dict[str, Any]] = [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}]
    for n, options in enumerate(trainers):
        search(*xor(), restarts=ONCE, trainer=partial(TRAINER, **options), folder=tmp_path)
        assert len(list(tmp_path.glob("*.json"))) == n + 1


def test_rows_that_repeat_are_warned_of() -> None:
    x, y = xor()
    with pytest.warns(UserWarning, match=r"40 rows of x and y are there before.* merge them first"):
        search(torch.cat([x, x[:40]]), torch.cat([y, y[:40]]), restarts=ONCE)


def test_examples_may_be_of_half_precision() -> None:
    x, y = xor()
    assert len(search(x.bfloat16(), y, restarts=ONCE).features) == 2


def test_labels_of_another_coding_are_warned_of() -> None:
    x, y = xor()
    with pytest.warns(UserWarning, match=r"y has the values -1 and 1: binary_cross_entropy takes 0.0 and 1.0"):
        search(x, 2 * y - 1, restarts=ONCE)


def test_labels_that_stand_in_few_orders_are_warned_of() -> None:
    x, y = xor()
    some = torch.cat([(y == 0).nonzero()[:30, 0], (y == 1).nonzero()[:30, 0]])
    with pytest.warns(
        UserWarning, match=r"labels of 12 held-out examples can stand in \d+ orders, fewer than the 2e\+04"
    ):
        search(x[some], y[some], restarts=replace(ONCE, n=2))


def test_as_many_are_held_out_as_are_tested_and_all_others_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = xor()
    monkeypatch.setattr(search_module, "MAX_HELD", 30)
    fitted, held, _, which = search_module._Search(Net, TRAINER, x, y, "net.0.weight", True, (2,), QUICK, 0, "").parts()
    assert (len(fitted), len(held), len(which)) == (N - 30, 30, 30)
    assert torch.equal(torch.cat([fitted, held]).sort().values, torch.arange(N))


def test_what_is_found_is_among_what_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, number: int, subset: int, n_tries: int) -> list[dict[str, Any]]:
        usual = {"stack": number, "subset": subset, "count": 2}
        n = len(self.parts().held)
        return [  # the first has the lowest loss with the labels that there are, but failed with others
            {**usual, "place": 0, "features": [0, 1], "loss": 0.1, "losses": [[0.1, 0.1], [0.1, torch.nan]] * (n // 2)},
            {**usual, "place": 1, "features": [3, 7], "loss": 0.5, "losses": [[0.5, 0.5]] * n},
        ]

    monkeypatch.setattr(search_module._Search, "run", run)
    found = search(*xor(), restarts=replace(ONCE, n=2, together=2))
    assert found.features == (3, 7)
    assert found.certificate.loss == pytest.approx(0.5)


def test_a_try_that_diverges_is_an_error() -> None:
    class Diverges(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first = dict(self.named_parameters())["net.0.bias"][0]
            return super().training_step(batch, batch_idx) * torch.where(first > 0, torch.nan, 1.0)

    with pytest.raises(RuntimeError, match=r"scores: .* are NaN; pruning would be arbitrary"):
        search(*xor(), network=Diverges)


class TwoReaders(Net):
    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.skip = nn.Linear(n_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x) + self.skip(x).squeeze(-1)
        return logits


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "x": (lambda x, y: search(x[0], y), r"x has shape \(12,\)"),
    "no plan": (lambda x, y: search(x, y, restarts=5), "restarts is 5; allowed is a Restarts"),  # type: ignore[arg-type]
    "another order of rows": (
        lambda x, y: search(pd.DataFrame(x.numpy()), pd.Series(y.numpy()).sort_values()),
        r"y has another index than x; allowed are rows in the same order",
    ),
    "not finite": (lambda x, y: search(x.log(), y), r"x has values that are not finite in columns \[0, 1, 2"),
    "not finite, in a table": (
        lambda x, y: search(pd.DataFrame(x.numpy()).assign(age=torch.nan), y),
        r"x has values that are not finite in columns \['age'\]",
    ),
    "texts": (
        lambda x, y: search(pd.DataFrame(x.numpy()).assign(job="cook"), y),
        r"x holds columns of other types: \{'job': 'str'\}; allowed are numbers",
    ),
    "columns of one name": (
        lambda x, y: search(pd.DataFrame([[1.0, "a"]] * 400, columns=["a", "a"]), y),
        r"x holds columns of other types: \{'a': 'str'\}",
    ),
    "labels that are texts": (lambda x, y: search(x, ["no", "yes"] * 200), "y holds <U3; allowed are numbers"),
    "labels that are bools": (lambda x, y: search(x, y > 0), "y has type torch.bool; allowed are floats for binary"),
    "a network": (lambda x, y: search(x, y, network=Net(8)), "network is a Net; allowed is a class or function"),
    "a Trainer": (lambda x, y: search(x, y, trainer=TRAINER()), "trainer is a Trainer; allowed is the class"),
    "epochs": (lambda x, y: search(x, y, trainer=partial(TRAINER, max_epochs=3)), "trainer: max_epochs is given"),
    "y": (lambda x, y: search(x, y[:5]), r"y has shape \(5,\); allowed is one label for each of the 400 rows"),
    "few rows": (lambda x, y: search(x[:3], y[:3]), "x has 3 rows; allowed is 4 or more"),
    "all features": (lambda x, y: search(x, y, 12), r"n_features is \[12\]; allowed are 1 to 11"),
    "no feature": (lambda x, y: search(x, y, []), r"n_features is \[\]"),
    "a fraction": (lambda x, y: search(x, y, 0.5), r"n_features is 0.5; allowed is an int, or several"),
    "no seed": (lambda x, y: search(x, y, seed=None), "seed is None; allowed is an int >= 0"),
    "half a seed": (lambda x, y: search(x, y, seed=1.5), "seed is 1.5; allowed is an int >= 0"),
    "labels that are not finite": (
        lambda x, y: search(x, torch.where(torch.arange(N) < 3, torch.nan, y)),
        "y has values that are not finite in 3 of 400 rows",
    ),
    "rows of labels that are not finite": (
        lambda x, y: search(x, torch.stack([y, y / 0], dim=1)),
        "y has values that are not finite in 400 of 400 rows",
    ),
    "labels that are alike": (lambda x, y: search(x, 0 * y), "y is the same in every row; allowed are two labels"),
    "a level in words": (lambda x, y: Restarts(level="low"), "level is 'low'; allowed is a float"),  # type: ignore[arg-type]
    "seed": (lambda x, y: search(x, y, seed=-1), "seed is -1; allowed is an int >= 0"),
    "a large subset": (
        lambda x, y: search(x, y, restarts=Restarts(subset=13)),
        "subset is 13; allowed is more than the 2",
    ),
    "a fraction of the subset": (lambda x, y: search(x, y, restarts=Restarts(subset=1.5)), "subset is 1.5"),
    "a small subset": (lambda x, y: search(x, y, restarts=Restarts(subset=[8, 2])), r"subset is \[8, 2\]"),
    "two readers": (lambda x, y: search(x, y, network=TwoReaders), "net.0.weight, skip.weight read the features"),
    "columns of one name, all numbers": (
        lambda x, y: search(pd.DataFrame(x.numpy(), columns=["a", "b"] * 6), y),
        "x has several columns of the name 'a'",
    ),
    "all held out": (
        lambda x, y: search(x, y, restarts=replace(ONCE, held_out=0.999)),
        "held_out is 0.999 of 400 examples; allowed is what leaves two or more",
    ),
    "no network": (lambda x, y: search(x, y, network=lambda n: None), "network returned a NoneType"),
    "a plain module": (
        lambda x, y: search(x, y, network=partial(nn.Linear, out_features=1)),
        "network returned a Linear",
    ),
    "no jobs": (lambda x, y: search(x, y, n_jobs=0), "n_jobs is 0; allowed is -1, or an int >= 1"),
    "a backend": (lambda x, y: search(x, y, backend="dask"), "backend is 'dask'; allowed is one of 'loky', 'ray'"),
    "tries": (lambda x, y: Restarts(0), "n is 0; allowed is an int >= 1"),
    "held out": (lambda x, y: Restarts(held_out=1.0), r"held_out is 1.0; allowed is a float in \(0, 1\)"),
    "level": (lambda x, y: Restarts(level=0), r"level is 0; allowed is a float in \(0, 1\)"),
}


def test_a_network_of_no_number_of_features_is_told_how_it_is_called() -> None:
    with pytest.raises(TypeError, match="takes 0 positional arguments") as caught:
        search(*xor(), network=lambda: Net(2))  # type: ignore[arg-type, misc]
    assert caught.value.__notes__ == ["network: it is called with a number of features, network(n_features)"]


def test_a_trainer_that_ends_early_is_named() -> None:
    message = "a stack of tries failed: ValueError: trainer: it ended after 1 epochs; allowed is one that trains 18"
    with pytest.raises(RuntimeError, match=message):
        search(*xor(), trainer=partial(pl.Trainer, accelerator="cpu", max_steps=4))


def test_a_trainer_that_makes_fewer_steps_than_it_says_is_named() -> None:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    with pytest.raises(RuntimeError, match="features are left where 2 should be"):
        search(*xor(), network=Skips)


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(*xor())
