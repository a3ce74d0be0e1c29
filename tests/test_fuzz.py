"""Random networks, targets, schedules and orders of callbacks: what must always hold."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    Geometric,
    Growth,
    Linear,
    NeuronPruning,
    OneShot,
    SETRewiring,
    SparseLinear,
    sparsity_of,
)
from tests.helpers import same, trainer

STEPS, N_INPUTS = 24, 6
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
}


class Trained(pl.LightningModule):
    def __init__(self, layers: list[nn.Module], optimizer: str) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        return made


@st.composite
def networks(draw: Any) -> Trained:
    torch.manual_seed(draw(st.integers(0, 99)))
    widths = [N_INPUTS, *draw(st.lists(st.integers(2, 12), min_size=1, max_size=3)), 2]
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        is_sparse = draw(st.integers(0, 4)) == 0
        layers.append(SparseLinear(n_in, n_out, 1.0) if is_sparse else nn.Linear(n_in, n_out, bias=draw(st.booleans())))
        if i < len(widths) - 2:
            layers.append(draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Identity]))())
            if draw(st.integers(0, 5)) == 0:
                layers.append(nn.BatchNorm1d(n_out))
    return Trained(layers, draw(st.sampled_from(sorted(OPTIMIZERS))))


@st.composite
def schedules(draw: Any) -> Any:
    start = draw(st.integers(0, 14))
    kind = draw(st.sampled_from([Annealing, Cubic, Geometric, Linear, OneShot]))
    return OneShot(start + 1) if kind is OneShot else kind(start, start + draw(st.integers(1, 8)))


@st.composite
def pruning(draw: Any, module: Trained) -> list[Any]:
    """Draw one to three callbacks, in any order."""
    weights = {
        name: p
        for name, p in module.named_parameters()
        if name.endswith("weight") and not isinstance(layer_of(module, name), nn.BatchNorm1d)
    }
    hidden = list(weights)[:-1]
    made: list[Any] = []
    for kind in draw(st.lists(st.sampled_from(["cpna", "neurons", "set"]), min_size=1, max_size=3)):
        if kind == "cpna":
            names = draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=2, unique=True))
            targets: Any = {name: draw(st.integers(1, weights[name].numel())) for name in names}
            score = draw(st.sampled_from(["magnitude", "path", "random", "gradient"]))
            normalize = draw(st.sampled_from([None, False]))
            options = {"scope": draw(st.sampled_from(["layer", "shared"])), "name": f"cpna{len(made)}"}
            made.append(CPNAPruning(targets, schedule=draw(schedules()), score=score, normalize=normalize, **options))
        elif kind == "neurons":
            name = draw(st.sampled_from(hidden))
            score = draw(
                st.sampled_from(["norm", "in_degree", "out_degree", "activation", "mean_replacement", "random"])
            )
            made.append(
                NeuronPruning(
                    {name: draw(st.integers(1, layer_of(module, name).out_features))},
                    schedule=draw(schedules()),
                    score=score,
                    compensate=None,
                    name=f"neurons{len(made)}",
                )
            )
        else:
            growth = Growth(draw(st.sampled_from(["random", "gradient", "momentum"])), seed=draw(st.integers(0, 9)))
            names = draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=2, unique=True))
            made.append(
                SETRewiring(names, every=draw(st.integers(2, 6)), epsilon=1.0, growth=growth, name=f"set{len(made)}")
            )
    return made


def layer_of(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name.removesuffix(".weight"))


class Invariants(pl.Callback):
    """Asserts after every step what must hold, whatever acts."""

    def __init__(self) -> None:
        self.removed: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        sparsity = sparsity_of(pl_module)
        for name, mask in sparsity.masks.items():
            parameter = pl_module.get_parameter(name)
            assert mask.live.shape == parameter.shape
            assert mask.n_live == int(mask.live.sum())
            assert not parameter[~mask.live].any(), "what does not live is zero"
            assert not (mask.removed & mask.live).any(), "what was removed for good does not live"
            if name in self.removed and self.removed[name].shape == mask.removed.shape:
                assert not (self.removed[name] & ~mask.removed).any(), "nothing that was removed comes back"
            self.removed[name] = mask.removed.clone()
            for value in trainer.optimizers[0].state[parameter].values():
                if isinstance(value, Tensor) and value.ndim:
                    assert value.shape == parameter.shape, "moments belong to the weights"
                    assert not value[~mask.live].any(), "what does not live has no momentum"


def examples() -> DataLoader[Any]:
    x = torch.randn(32, N_INPUTS, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x[:, :2] * x[:, 2:4]), batch_size=8)


def check(module: Trained, callbacks: list[Any]) -> None:
    """Train, and check what must hold in the end; an error must name what it is about."""
    refusal, fresh = "", copy.deepcopy(callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer(*callbacks, Invariants(), epochs=STEPS // 4).fit(module, examples())
        except ValueError as error:
            refusal = str(error)
    if refusal:
        event("refused")
        assert "; allowed is " in refusal or "; allowed are " in refusal or "; use " in refusal, refusal
        assert "at step" not in refusal, refusal
        return
    event("trained")
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    sparsity = sparsity_of(module)
    for callback in callbacks:
        if isinstance(callback, SETRewiring):
            continue
        for name, wanted in callback.targets.items():
            others = [other for other in callbacks if other is not callback]
            if isinstance(callback, NeuronPruning):
                n = sparsity.n_units(name)
            elif callback.scope == "layer" and not any(isinstance(other, SETRewiring) for other in others):
                n = sparsity.masks[name].n_live
            else:
                continue
            assert n <= wanted
            assert n == wanted or others or len(callback.targets) > 1, "another may remove what is dead"
    state = sparsity.masks.state_dict()
    again = type(sparsity.masks).of(copy.deepcopy(state))
    assert {name: mask.live.tolist() for name, mask in again.items()} == {
        name: mask.live.tolist() for name, mask in sparsity.masks.items()
    }
    for callback, other in zip(callbacks, fresh, strict=True):
        saved = callback.state_dict()
        other.load_state_dict(copy.deepcopy(saved))
        assert same(other.state_dict(), saved)


@given(st.data())
def test_whatever_is_combined_counts_hold_and_nothing_comes_back(data: Any) -> None:
    module = data.draw(networks())
    check(module, data.draw(pruning(module)))


@pytest.mark.slow
@settings(max_examples=1500)
@given(st.data())
def test_whatever_is_combined_counts_hold_and_nothing_comes_back_in_many_more_cases(data: Any) -> None:
    module = data.draw(networks())
    check(module, data.draw(pruning(module)))
