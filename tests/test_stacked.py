"""Stacks: against their members alone, in float64."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Geometric,
    NeuronPruning,
    OneShot,
    Score,
    SETRewiring,
    SparseLinear,
    Sparsity,
    Target,
    TicketRewind,
    compact,
    connectivity,
    member,
    member_loader,
    sparsity_of,
    stack,
    trace,
)
from lightning_cpna.targets import Axes, all_targets
from tests.helpers import on_every_device

N, P, BATCH, STEPS, MEMBERS = 100, 6, 16, 20, 3


class Classifier(pl.LightningModule):
    def __init__(self, norm: bool = False, dropout: float = 0.0, optimizer: str = "Adam") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(P, 12),
            nn.BatchNorm1d(12) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(12, 1),
        )
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).squeeze(-1)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.optimizer)
        options = {"weight_decay": 1e-3} if self.optimizer != "LBFGS" else {}
        return kind(self.parameters(), lr=1e-2, **options)  # type: ignore[no-any-return]


class Lightning2(L.LightningModule):
    """The same for the other package."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.optimizer = nn.Sequential(nn.Linear(P, 12), nn.ReLU(), nn.Linear(12, 1)), "Adam"

    forward = Classifier.forward
    training_step = Classifier.training_step
    configure_optimizers = Classifier.configure_optimizers


class Deep(Classifier):
    """Has two hidden layers and three outputs, so that members keep different numbers of live units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(P, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y.long() + (x[:, 2] > 1).long())
        self.log("loss", loss)
        return loss


def members(kind: Any = Classifier, n: int = MEMBERS, **options: Any) -> list[Any]:
    return [kind(**options).double() for _ in range(n)]


def examples() -> tuple[Tensor, Tensor]:
    x = torch.randn(MEMBERS, N, P, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x, (x[..., 0] * x[..., 1] > 0).double()


def fit(module: Any, loader: Any, callbacks: list[Any] = [], flavour: Any = pl, **options: Any) -> Any:  # noqa: B006
    settings = {"max_steps": STEPS, "max_epochs": -1, "logger": False, "enable_checkpointing": False, **options}
    settings = {"enable_progress_bar": False, "enable_model_summary": False, **settings}
    trainer = flavour.Trainer(accelerator="cpu", callbacks=callbacks, **settings)
    trainer.fit(module, loader)
    return trainer


class OneMember(pl.Callback):
    """Gives a member that trains alone the global generator that it has in a stack."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, *_: Any) -> None:
        torch.manual_seed(self.seed)


def alone(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Take the axis of members from a loader for one."""
    loader.collate_fn = lambda batch: [tensor[0] for tensor in batch]
    return loader


def connections(normalize: bool | None) -> list[Any]:
    return [
        CPNAPruning({"net.4.weight": 4}, schedule=Annealing(3, 12), normalize=normalize, name="hidden"),
        CPNAPruning({"net.0.weight": 10}, schedule=Geometric(12, 18), normalize=False, name="input"),
    ]


PRUNING: dict[str, tuple[dict[str, Any], Callable[[], list[Any]]]] = {
    "connections, normalised": ({}, lambda: connections(None)),
    "behind BatchNorm": ({"norm": True}, lambda: connections(False)),
    "dropout": ({"dropout": 0.3}, lambda: connections(None)),
    "features": (
        {},
        lambda: [CPNAPruning({"net.0.weight": 2}, granularity="feature", schedule=Geometric(2, 18))],
    ),
    "units": ({}, lambda: [CPNAPruning({"net.0.weight": 3}, granularity="unit", schedule=Geometric(2, 18))]),
    "neurons": (
        {},
        lambda: [NeuronPruning({"net.0.weight": 3}, score="norm", compensate=None, schedule=Geometric(2, 18))],
    ),
    "a shared budget": (
        {},
        lambda: [CPNAPruning({"net.*.weight": 20}, scope="shared", normalize=False, schedule=Geometric(2, 18))],
    ),
    "SGD with momentum": ({"optimizer": "SGD"}, lambda: connections(None)),
    "other counts in every member": (
        {"kind": Deep},
        lambda: [
            CPNAPruning({"net.4.weight": 5}, schedule=Annealing(1, 6), name="output"),
            CPNAPruning({"net.2.weight": 12}, schedule=Geometric(6, 12), normalize=False, name="hidden"),
            CPNAPruning({"net.0.weight": 10}, schedule=Geometric(12, 18), normalize=False, name="input"),
        ],
    ),
    "the default, deep": (
        {"kind": Deep},
        lambda: [CPNAPruning({"net.4.weight": 5, "net.2.weight": 12, "net.0.weight": 10})],
    ),
}


@pytest.mark.parametrize("case", PRUNING)
def test_every_member_trains_and_is_pruned_as_if_it_were_alone(case: str) -> None:
    options, callbacks = PRUNING[case]
    one_by_one, (x, y) = members(**options), examples()
    stacked = stack(one_by_one, seeds=range(10, 10 + MEMBERS))
    trainer = fit(stacked, member_loader([x, y], batch_size=BATCH, seeds=range(MEMBERS)), callbacks())
    losses = []
    for i, single in enumerate(one_by_one):
        loader = alone(member_loader([x[i : i + 1], y[i : i + 1]], batch_size=BATCH, seeds=[i]))
        losses.append(fit(single, loader, [*callbacks(), OneMember(10 + i)]).callback_metrics["loss"])
        for (name, ours), theirs in zip(
            member(stacked, i).state_dict().items(), single.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
            assert torch.equal(ours == 0, theirs == 0), name
    counts = [budget.n_end for budget in sparsity_of(stacked).budgets]
    assert [sparsity_of(stacked).n_remaining(budget) for budget in sparsity_of(stacked).budgets] == counts
    torch.testing.assert_close(trainer.callback_metrics["loss"], torch.stack(losses).mean())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.same = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.same.weight
        self.last = nn.Linear(4, 2)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(4))
        self.offset = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, *, power: int) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = self.second(x).mean((2, 3)) * self.scale**power + self.offset
        out: Tensor = self.last(nn.functional.layer_norm(self.tied(self.same(x)), (4,)))
        return out


@pytest.mark.parametrize("training", [True, False])
def test_members_of_any_kind_answer_as_alone(training: bool) -> None:
    nets = [Images().double().train(training) for _ in range(MEMBERS)]
    x = torch.randn(MEMBERS, 5, 3, 8, 8, dtype=torch.float64)
    stacked = stack(nets)
    found = stacked(x, power=2)
    for i, net in enumerate(nets):
        torch.testing.assert_close(found[i], net(x[i], power=2), rtol=0, atol=1e-12)
        for ours, theirs in zip(member(stacked, i).state_dict().values(), net.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert stacked.tied.weight is stacked.same.weight
    assert [p.requires_grad for p in stacked.parameters()] == [p.requires_grad for p in nets[0].parameters()]


def test_dropout_draws_what_torch_draws_with_the_seed_of_the_member() -> None:
    nets = [nn.Sequential(nn.Linear(P, 4), nn.Dropout(p)).double() for p in [0.4] * MEMBERS]
    x, stacked = torch.randn(MEMBERS, 7, P, dtype=torch.float64), stack(nets, seeds=[3, 4, 5])
    first, second = stacked(x), stacked(x)
    for i, net in enumerate(nets):
        torch.manual_seed(3 + i)
        torch.testing.assert_close(torch.stack([first[i], second[i]]), torch.stack([net(x[i]), net(x[i])]))
    assert torch.equal(stacked.eval()(x)[1], stacked(x)[1])


def test_members_that_drop_everything_or_nothing() -> None:
    x = torch.randn(2, 3, 4)
    assert not stack([nn.Dropout(1.0), nn.Dropout(1.0)])(x).any()
    assert torch.equal(stack([nn.Dropout(0.0), nn.Dropout(0.0)])(x), x)


def test_dropout_in_place_changes_its_input() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 1.0 * x
            nn.functional.dropout(y, 0.5, inplace=True)
            return y

    x = torch.ones(2, 3, 400)
    dropped = stack([InPlace(), InPlace()], seeds=[0, 1])(x)
    assert torch.equal(dropped, stack([nn.Dropout(0.5), nn.Dropout(0.5)], seeds=[0, 1])(x))


def test_a_random_operation_besides_dropout_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match=r"the members of a stack cannot run forward together; .*random"):
        stack([Noisy(), Noisy()])(torch.zeros(2, 3, 4))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_the_trace_of_a_stack_is_that_of_a_member_with_an_axis_more() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))
    x = torch.randn(2, 5, 2, 4, 4)
    found, expected = trace(stack([net, net]), x), trace(net, x[0])
    for name, layer in expected.items():
        assert torch.equal(found[name].sources, layer.sources)
        assert found[name].axes == Axes(member=0, unit=1, input=2)
        assert (found[name].bias, found[name].obstacles) == (layer.bias, layer.obstacles)


def test_the_names_are_those_of_a_member_and_the_class_is_one_of_its_own() -> None:
    single, *others = members()
    stacked = stack([single, *others])
    assert isinstance(stacked, Classifier)
    assert list(all_targets(stacked)) == list(all_targets(single))
    assert isinstance(all_targets(stacked)["net.0.weight"], Target)
    assert stacked.get_parameter("net.0.weight").shape == (MEMBERS, 12, P)
    assert type(member(stacked, 0)) is Classifier
    assert all_targets(member(stacked, 0))["net.0.weight"].axes == Axes()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda stacked: pickle.loads(pickle.dumps(stacked))])
def test_a_copied_stack_is_the_same_stack(again: Callable[[Any], Any]) -> None:
    stacked = stack(members(dropout=0.5))
    x, twin = examples()[0], again(stacked)
    assert torch.equal(twin(x), stacked(x))
    torch.testing.assert_close(twin.state_dict(), stacked.state_dict())
    assert torch.equal(twin(x), stacked(x)), "the generators are copied, too"


def test_a_resumed_stack_is_the_one_that_did_not_stop(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> Any:
        torch.manual_seed(0)
        stacked = stack(members(dropout=0.3))
        loader = member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS))
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=connections(None),
        )  # fmt: skip
        trainer.fit(stacked, loader, **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return stacked

    straight = run(3)
    run(1)
    resumed = run(3, ckpt_path=tmp_path / "1.ckpt")
    for ours, theirs in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(torch.load(tmp_path / "3.ckpt", weights_only=True), dict)


@pytest.mark.parametrize(("kind", "flavour"), [(Classifier, pl), (Lightning2, L)])
def test_a_stack_is_trained_by_the_trainer_of_its_members(kind: Any, flavour: Any) -> None:
    stacked = stack(members(kind))
    before = stacked.net[0].weight.clone()
    pruning = [CPNAPruning({"net.0.weight": 10}, schedule=Geometric(0, 3))]
    fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), pruning, flavour, max_steps=3)
    assert not torch.equal(stacked.net[0].weight, before)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Holds(nn.Linear):
    """A layer with an attribute that is neither a parameter nor a buffer."""

    def __init__(self, what: Any, own: int = 0) -> None:
        super().__init__(2, 3)
        self.what, self._own = what, own


class Focal:
    def __init__(self, gamma: float) -> None:
        self.gamma = gamma


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no members": (lambda: stack([]), ValueError, "members is empty"),
    "seeds": (lambda: stack(members(), seeds=[1]), ValueError, "seeds has 1 entries"),
    "another class": (lambda: stack([nn.ReLU(), nn.Tanh()]), ValueError, r"members\[1\]: it is Tanh.*has: ReLU"),
    "another shape": (lambda: stack([nn.Linear(2, 3), nn.Linear(2, 4)]), ValueError, "out_features=4.*out_features=3"),
    "no bias": (lambda: stack([nn.Linear(2, 3), nn.Linear(2, 3, bias=False)]), ValueError, "bias=False.*bias=True"),
    "another part": (
        lambda: stack([nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())]),
        ValueError,
        r"members\[1\]: 0 is Tanh",
    ),
    "another rate": (lambda: stack([nn.Dropout(0.1), nn.Dropout(0.2)]), ValueError, "p=0.2.*p=0.1"),
    "another mode": (lambda: stack([nn.ReLU(), nn.ReLU().eval()]), ValueError, "in eval mode.*in training mode"),
    "another type": (lambda: stack([nn.Linear(2, 3), nn.Linear(2, 3).double()]), ValueError, "float64.*float32"),
    "another attribute": (
        lambda: stack(members(n=1) + members(optimizer="SGD", n=1)),
        ValueError,
        r"members\[1\]: optimizer is 'SGD'; allowed is what the first has: 'Adam'",
    ),
    "another list": (lambda: stack([Holds([1, 2]), Holds([1, 3])]), ValueError, r"what is \[1, 3\]; .*\[1, 2\]"),
    "another function": (
        lambda: stack([Holds(torch.relu), Holds(torch.sin)]),
        ValueError,
        "what is <built-in method sin",
    ),
    "another tensor": (
        lambda: stack([Holds(torch.zeros(2)), Holds(torch.ones(2))]),
        ValueError,
        r"what is torch.float32 \(2,\)",
    ),
    "another object": (
        lambda: stack([Holds(Focal(1.0)), Holds(Focal(3.0))]),
        ValueError,
        "what is <tests.test_stacked.Focal object> with {'gamma': 3.0}",
    ),
    "another attribute of its own": (lambda: stack([Holds(1, 2), Holds(1, 3)]), ValueError, "_own is 3; .*: 2"),
    "recurrent": (lambda: stack([nn.LSTM(2, 3)]), TypeError, r"members\[0\]: it is recurrent"),
    "a module": (lambda: stack(nn.ReLU()), TypeError, "members is a ReLU; allowed is a list of modules"),  # type: ignore[arg-type]
    "a generator": (lambda: stack(net for net in members()), TypeError, "members is a generator"),  # type: ignore[arg-type]
    "a class": (lambda: stack([nn.ReLU]), TypeError, r"members\[0\] is a type; allowed are modules"),  # type: ignore[type-var]
    "a loader": (lambda: member_loader([[1]], batch_size=1, seeds=[0]), TypeError, "allowed is a list of tensors"),  # type: ignore[list-item]
    "frozen": (
        lambda: stack([nn.Linear(2, 3), nn.Linear(2, 3).requires_grad_(False)]),
        ValueError,
        "weight is .*trained",
    ),
    "sparse": (lambda: stack([SparseLinear(4, 4, 2.0)]), TypeError, "'weight' belongs to a SparseLinear"),
    "lazy": (lambda: stack([nn.LazyLinear(4)]), TypeError, "'weight' has no shape yet"),
    "a stack": (lambda: stack([stack([nn.ReLU()])]), TypeError, r"members\[0\] is a stack itself"),
    "manual": (lambda: stack([Manual()]), TypeError, "automatic_optimization"),
    "no such member": (lambda: member(stack([nn.ReLU()]), 1), IndexError, "place is 1; allowed is 0 to 0"),
    "no stack": (lambda: member(nn.ReLU(), 0), TypeError, "stacked is a ReLU"),
    "no member axis": (
        lambda: stack([nn.ReLU(), nn.ReLU()])(torch.zeros(3, 4)),
        ValueError,
        r"shape \(3, 4\); .* leading axis of 2",
    ),
    "compact": (lambda: compact(stack([nn.Linear(2, 3)]), torch.zeros(1, 4, 2)), ValueError, "module is a stack"),
    "tensors": (
        lambda: member_loader([torch.zeros(2, 5), torch.zeros(2, 4)], batch_size=2, seeds=[0, 1]),
        ValueError,
        r"tensors have shapes \(2, 5\), \(2, 4\)",
    ),
    "other members": (
        lambda: member_loader([torch.zeros(2, 5)], batch_size=2, seeds=[0]),
        ValueError,
        "of the 1 members",
    ),
    "batch size": (lambda: member_loader([torch.zeros(1, 5)], batch_size=0, seeds=[0]), ValueError, "batch_size is 0"),
    "a fraction": (
        lambda: member_loader([torch.zeros(1, 5)], batch_size=2.0, seeds=[0]),  # type: ignore[arg-type]
        ValueError,
        "batch_size is 2.0; allowed is an int",
    ),
    "seed": (
        lambda: member_loader([torch.zeros(2, 5)], batch_size=2, seeds=[1, -1]),
        ValueError,
        "seeds has -1; allowed is 0 or more",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_stacked_is_named(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


class Averaging(Classifier):
    mean: Tensor

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer=optimizer)
        self.register_buffer("mean", torch.zeros(P))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return super().training_step(batch, batch_idx)


class Grouped(Classifier):
    """Has no weight decay for biases, or what it takes for them."""

    def configure_optimizers(self) -> Any:
        decayed = [x for x in self.parameters() if self.is_weight(x)]
        others = [x for x in self.parameters() if not self.is_weight(x)]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)}

    def is_weight(self, x: Tensor) -> bool:
        return x.ndim > 1


class GroupedByName(Grouped):
    def is_weight(self, x: Tensor) -> bool:
        return any(x is one for name, one in self.named_parameters() if name.endswith("weight"))


class LogsMetric(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("metric", MeanMetric())
        return super().training_step(batch, batch_idx)


REFUSED: dict[str, tuple[Any, dict[str, Any], list[Any], type[Exception], str]] = {
    "clipping by norm": (Classifier, {"gradient_clip_val": 1.0}, [], ValueError, "gradient_clip_algorithm='value'"),
    "LBFGS": (Classifier, {}, [], ValueError, "LBFGS, which may mix the members"),
    "Adafactor": (Classifier, {}, [], ValueError, "Adafactor, which may mix the members"),
    "metrics": (LogsMetric, {}, [], TypeError, "logs 'metric', a MeanMetric; allowed are numbers and tensors"),
    "a plateau": (Plateau, {}, [], ValueError, "trained with ReduceLROnPlateau"),
    "groups by shape": (Grouped, {}, [], ValueError, "makes other groups of a stack's parameters than of a member's"),
    "a buffer that is replaced": (
        Averaging,
        {},
        [],
        TypeError,
        "replaces its buffer 'mean'; allowed is to change it in",
    ),
    "rewiring": (
        Classifier,
        {},
        [SETRewiring({"net.0.weight": 0.5})],
        ValueError,
        "belongs to a stack; allowed are weights of single",
    ),
    "tickets": (Classifier, {}, [TicketRewind({"net.0.weight": 0.5}, epochs=1)], ValueError, "the module is a stack"),
    "activations": (
        Classifier,
        {},
        [NeuronPruning({"net.0.weight": 3}, score="activation", compensate=None, schedule=Geometric(2, 9))],
        ValueError,
        "belongs to no Linear or Conv module",
    ),
    "shrink": (
        Classifier,
        {},
        [CPNAPruning({"net.0.weight": 3}, granularity="unit", shrink=True)],
        ValueError,
        "shrink is True, but the module is a stack",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_mix_members_is_refused(case: str) -> None:
    kind, options, callbacks, error, message = REFUSED[case]
    stacked = stack(members(kind, optimizer=case if hasattr(torch.optim, case) else "Adam"))
    with pytest.raises(error, match=message):
        fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), callbacks, **options)


def test_parameters_that_are_grouped_by_name_are_trained_as_those_of_a_member() -> None:
    nets, (x, y) = members(GroupedByName), examples()
    stacked = stack(nets)
    fit(stacked, member_loader([x, y], batch_size=BATCH, seeds=range(MEMBERS)))
    for i, net in enumerate(nets):
        fit(net, alone(member_loader([x[i : i + 1], y[i : i + 1]], batch_size=BATCH, seeds=[i])))
        for ours, theirs in zip(member(stacked, i).parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_module_that_has_an_example_is_summarised_as_a_member_is() -> None:
    nets = members()
    for net in nets:
        net.example_input_array = torch.zeros(5, P, dtype=torch.float64)
    stacked = stack(nets)
    fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), enable_model_summary=True)
    assert torch.equal(member(stacked, 1).example_input_array, nets[1].example_input_array)


def test_a_scaler_that_skips_steps_of_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = stack(members())
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    monkeypatch.setattr(trainer.precision_plugin, "scaler", torch.amp.GradScaler("cpu"), raising=False)
    with pytest.raises(ValueError, match="trained with a gradient scaler"):
        trainer.fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="trained with 2 processes, which divide the batch"):
        fit(stack(members()), member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)))


class Logs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("examples", float(len(batch[0])), False, on_step=False, on_epoch=True)
        self.log("positional", loss, True)
        return loss


def test_what_members_log_is_logged_with_their_arguments_and_their_number_of_examples() -> None:
    stacked = stack(members(Logs))
    trainer = fit(
        stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), max_steps=-1, max_epochs=1
    )
    sizes = [BATCH] * (N // BATCH) + [N % BATCH]
    assert float(trainer.callback_metrics["examples"]) == pytest.approx(sum(n * n for n in sizes) / N)
    assert "positional" in trainer.progress_bar_metrics


def test_a_stack_inside_another_module_is_not_traced() -> None:
    with pytest.raises(ValueError, match="'0' is a stack inside another module"):
        trace(nn.Sequential(stack([nn.Linear(2, 3)])), torch.zeros(1, 4, 2))


def test_clipping_by_value_is_that_of_the_members_alone() -> None:
    one_by_one, (x, y) = members(), examples()
    stacked = stack(one_by_one)
    options: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    fit(stacked, member_loader([x, y], batch_size=BATCH, seeds=range(MEMBERS)), **options)
    fit(one_by_one[1], alone(member_loader([x[1:2], y[1:2]], batch_size=BATCH, seeds=[1])), **options)
    torch.testing.assert_close(member(stacked, 1).state_dict(), one_by_one[1].state_dict(), rtol=0, atol=1e-10)


def test_a_stack_is_not_validated() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    loader = member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS))
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="a stack of members is not validated"):
        trainer.fit(stack(members(Validated)), loader, loader)


@on_every_device
def test_every_member_takes_every_example_once_an_epoch_in_the_order_that_it_has_alone(device: str) -> None:
    x = torch.arange(20, device=device).expand(3, 20)
    loader, single = (
        member_loader([x[:n], x[:n]], batch_size=6, seeds=seeds) for n, seeds in ((3, [7, 8, 9]), (1, [8]))
    )
    orders = []
    for epoch in range(2):
        for one in (loader, single):
            one.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append(torch.cat([batch for batch, _ in loader], dim=1))
        assert torch.equal(orders[-1].sort(dim=1).values, x)
        assert torch.equal(torch.cat([batch for batch, _ in single], dim=1)[0], orders[-1][1])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0][0], orders[0][1])
    assert [len(batch[0]) for batch, _ in member_loader([x, x], batch_size=6, seeds=[0, 1, 2], drop_last=True)] == [
        6
    ] * 3


def test_members_of_lightning_modules_are_fitted_on_after_they_were_taken_out() -> None:
    stacked = stack(members())
    fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), max_steps=2)
    x, y = examples()
    fit(member(stacked, 1), DataLoader(TensorDataset(x[1], y[1]), batch_size=BATCH), connections(None))


def test_a_member_that_is_taken_out_keeps_its_masks() -> None:
    stacked = stack(members())
    fit(stacked, member_loader(examples(), batch_size=BATCH, seeds=range(MEMBERS)), connections(None))
    (x, y), one = examples(), member(stacked, 1)
    masks = sparsity_of(one).masks
    assert {name: mask.n_live for name, mask in masks.items()} == {"net.4.weight": 4, "net.0.weight": 10}
    zeros = [one.net[i].weight == 0 for i in (0, 4)]
    held = CPNAPruning({"net.0.weight": 10, "net.4.weight": 4}, schedule=OneShot(1))
    fit(one, DataLoader(TensorDataset(x[1], y[1]), batch_size=BATCH), [held])
    assert all(torch.equal(one.net[i].weight == 0, zero) for i, zero in zip((0, 4), zeros, strict=True))
    masks["net.0.weight"].remove_(torch.ones(12, P, dtype=torch.bool))
    assert sparsity_of(stacked).masks["net.0.weight"].n_live == 10 * MEMBERS


def two_members(first: list[list[list[float]]], last: list[list[float]]) -> tuple[Any, Sparsity]:
    """Stack networks of 2 inputs, 3 units and one output, which are given by their weights."""
    nets = [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in first]
    for net, w, v in zip(nets, first, last, strict=True):
        net[0].weight.data, net[2].weight.data = torch.tensor(w), torch.tensor([v])
    stacked = stack([Plain(net) for net in nets])
    sparsity = sparsity_of(stacked)
    sparsity.graph = trace(stacked, torch.rand(2, 4, 2))
    return stacked, sparsity


class Plain(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@dataclass
class Labelled:
    x: Any


@dataclass(slots=True)
class Slotted:
    x: Any


@pytest.mark.parametrize("kind", [Labelled, Slotted, lambda x: UserDict(x=x), lambda x: Labelled([{"x": Labelled(x)}])])
def test_tensors_that_would_be_the_same_for_all_members_are_refused(kind: Any) -> None:
    stacked, _ = two_members([[[1.0, 1.0]] * 3] * 2, [[1.0, 1.0, 0.0]] * 2)
    with pytest.raises(
        TypeError, match=r"is a (Labelled|Slotted|UserDict), .* allowed are tensors, and lists, tuples and dicts"
    ):
        stacked([kind(torch.rand(2, 4, 2))])


def test_a_member_knows_the_layers_that_were_traced() -> None:
    stacked, sparsity = two_members([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]] * 2, [[1.0, 2.0, 3.0]] * 2)
    [budget] = sparsity.add_budgets(stacked, {"net.2.weight": 1})
    sparsity.prune_(budget, 1, Score("magnitude"))
    alone = member(stacked, 1)
    one = sparsity_of(alone)
    one.remove_dead_units_()
    assert {layer.name: layer.effective for layer in one.report().layers} == {"net.0.weight": 2, "net.2.weight": 1}
    assert [len(weight) for *_, weight in connectivity(one).layers] == [2, 1]


def test_dead_units_go_from_the_members_whose_budget_allows_it() -> None:
    stacked, sparsity = two_members([[[1.0, 1.0]] * 3] * 2, [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    sparsity.add_budgets(stacked, {"net.0.weight": 4})
    sparsity.remove_("net.2.weight", stacked.net[2].weight == 0)
    sparsity.remove_dead_units_(members=[False, False])
    assert sparsity.masks["net.0.weight"].n_live == 12
    sparsity.remove_dead_units_()
    assert (stacked.net[0].weight != 0).flatten(1).sum(1).tolist() == [4, 6]  # the second would have been left with two


def test_every_member_keeps_as_many_as_it_is_told() -> None:
    weights = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[6.0, 5.0], [4.0, 3.0], [2.0, 1.0]]]
    stacked, sparsity = two_members(weights, [[1.0] * 3] * 2)
    [budget] = sparsity.add_budgets(stacked, {"net.0.weight": 1})
    assert sparsity.prune_(budget, [2, 4], Score("magnitude")) == 3
    assert stacked.net[0].weight.flatten(1).tolist() == [[0, 0, 0, 0, 5, 6], [6, 5, 4, 3, 0, 0]]
    assert sparsity.counts(budget) == [2, 4]
    for n in ([3, 4], [1], 5):
        with pytest.raises(
            ValueError, match=r"n is .*; allowed is what remains of 'net.0.weight', (\[2, 4\]|4), or less"
        ):
            sparsity.prune_(budget, n, Score("magnitude"))
    sparsity.prune_(budget, 3, Score("magnitude"))
    assert sparsity.counts(budget) == [2, 3]
