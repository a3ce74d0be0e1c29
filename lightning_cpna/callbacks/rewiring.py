"""SETRewiring: the weakest connections make room for as many new ones, again and again."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpna._lightning import LightningModule, Trainer
from lightning_cpna.callbacks.base import SparsityCallback
from lightning_cpna.callbacks.capture import running_eagerly
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.callbacks.ranks import broadcast
from lightning_cpna.callbacks.scheduled import check_choice, check_targets
from lightning_cpna.growth import Decay, Factors, Growth, GrowthKind, check_zeta
from lightning_cpna.layers import layers_of
from lightning_cpna.mask import ListMask
from lightning_cpna.moments import optimizer_of
from lightning_cpna.rewiring import plant_, rewire_
from lightning_cpna.sparsity import Budget, Sparsity
from lightning_cpna.targets import Target, n_keep, resolve
from lightning_cpna.topology import Distribution, n_connections, shared_out
from lightning_cpna.words import in_words

MEMORY = 0.9  # of a gradient, from one batch to the next (Dettmers and Zettlemoyer 2019, Section 3)


class SETRewiring(SparsityCallback):
    """Train sparse from the first step on: remove the weakest connections and grow as many, after every epoch.

    The number of connections of each layer stays exactly what it is. Works on ``Linear`` and ``Conv`` weights, by masks, and
    on ``SparseLinear``, which stores and computes its live connections only.

    Args:
        targets: Names or globs of weights. A list: each dense one begins with Erdos-Renyi connections, about ``epsilon *
            (inputs + units)``. A dict says instead how many each begins with: an int is a count, a float in (0, 1) a
            density. What is sparse already, by masks or as a ``SparseLinear``, keeps what it has.
        zeta: Which fraction of the connections goes, of the positive and of the negative ones; or a ``Decay``, which says so
            while the run goes on.
        every: "epoch": when the next epoch starts, so never after the last one, and what was validated is what was saved. An
            int: after so many optimizer steps.
        growth: Which connections come: the name of a kind ("random" is SET, "gradient" is RigL), or a ``Growth``, which also
            says with which weights.
        epsilon: See ``targets``.
        distribution: How a count or density of a dict is shared by the dense layers that its name matches: "uniform": it is
            that of each layer; "er", "erk": that of all together (see ``topology.shared_out``).
        name: Prefix of what is logged and key of the saved state; two callbacks need two names.

    Raises:
        ValueError: If an argument is out of range (here, or when training starts and the module is known).

    Logged: ``{name}/connections``, ``{name}/density``, ``{name}/zeta`` and ``{name}/exchanged`` of the last rewiring, and for
    each layer ``connections``, ``density``, ``live_units``, ``live_features``, and ``effective`` where another callback has
    traced the network.

    Reference:
        Mocanu et al.: Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
        science (2018); Evci et al.: Rigging the lottery (2020).

    Examples:
        >>> SETRewiring(["net.*.weight"], zeta=0.3, epsilon=10).name
        'rewiring'
    """

    _turn = 1

    def __init__(
        self,
        targets: list[str] | dict[str, int | float],
        *,
        zeta: float | Decay = 0.3,
        every: int | Literal["epoch"] = "epoch",
        growth: GrowthKind | Growth = "random",
        epsilon: float = 20.0,
        distribution: Distribution = "uniform",
        name: str = "rewiring",
    ) -> None:
        if isinstance(targets, list):
            if not targets or not all(isinstance(pattern, str) for pattern in targets):
                raise ValueError(f"targets is {targets!r}; allowed is a list of names, at least one, or a dict")
            if distribution != "uniform":
                raise ValueError(f"distribution is {distribution!r}; allowed with a list of targets is 'uniform'")
        elif isinstance(targets, dict):
            check_targets(targets)
        else:
            raise ValueError(
                f"targets is {targets!r}; allowed is a list of names, or a dict from name to count or density"
            )
        if not isinstance(zeta, Decay):
            check_zeta(zeta)
        if every != "epoch" and (type(every) is not int or every < 1):
            raise ValueError(f"every is {every!r}; allowed is 'epoch' or an int >= 1")
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon}; allowed is a float > 0")
        check_choice("distribution", distribution, ("uniform", "er", "erk"))
        self.targets = targets
        self.zeta = zeta
        self.every = every
        self.growth = growth
        self.epsilon = epsilon
        self.distribution: Distribution = distribution
        self._growth = growth if isinstance(growth, Growth) else Growth(growth)
        self._generator = torch.Generator()
        super().__init__(name)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"targets": self.targets}

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the random generator's state and, where growth looks at them, gradients."""
        return {
            **super().state_dict(),
            "generator": self._generator.get_state(),
            "stds": dict(self._stds),
            "last": list(self._last),
            "gradients": {name: _to_state(gradient) for name, gradient in self._gradients.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state from a checkpoint."""
        super().load_state_dict(state_dict)
        self._generator.set_state(state_dict["generator"])
        self._stds = dict(state_dict["stds"])
        zeta, exchanged = state_dict["last"]
        self._last = (zeta, exchanged)
        self._gradients = {name: _from_state(gradient) for name, gradient in state_dict["gradients"].items()}

    def _begin(self) -> None:
        super()._begin()
        seed = self._growth.seed
        self._generator.manual_seed(torch.initial_seed() if seed is None else seed)
        self._stds = dict[str, float]()
        self._last = (0.0, 0)
        self._gradients = dict[str, Tensor | list[Factors]]()
        self._pending = dict[str, Tensor | list[Factors]]()
        self._is_complete = False  # whether what is pending is that of a whole step
        self._stride = 1  # steps a batch

    # Before training

    def _find_budgets(self, sparsity: Sparsity, pl_module: LightningModule) -> list[Budget]:
        found = [target for group in resolve(pl_module, self.targets).values() for target in group]
        for target in found:
            if target.axes.input is None or target.axes.member is not None:
                what = "belongs to a stack" if target.axes.member is not None else "is no weight of a layer"
                raise ValueError(f"targets: {target.name!r} {what}; allowed are weights of single networks")
            sparsity.add_mask(target.name)
        self._refuse_more(sparsity, pl_module)
        return [
            Budget(target.name, (target.name,), "connection", sparsity.masks[target.name].n_live) for target in found
        ]

    def _refuse_more(self, sparsity: Sparsity, pl_module: LightningModule) -> None:
        """Raise where a layer that is sparse already has more connections than it should begin with."""
        if isinstance(self.targets, list) or self.distribution != "uniform":
            return
        for pattern, group in resolve(pl_module, self.targets).items():
            for target in group:
                n, mask = n_keep(self.targets[pattern], target.axes.size(target.parameter), target.name), sparsity.masks
                if not _is_dense(sparsity, target) and mask[target.name].n_live > n:
                    raise ValueError(
                        f"targets: {target.name!r} should begin with {n} connections, but is sparse already, with "
                        f"{mask[target.name].n_live}; allowed is its name in a list, which keeps what it has"
                    )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, and let connections of dense ones rest."""
        super().on_fit_start(trainer, pl_module)
        fit = self._running()
        masks = fit.sparsity.masks
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(other, SETRewiring) or other is self or other._fit is None:
                continue
            if shared := set(fit.names) & set(other._fit.names):
                raise ValueError(
                    f"targets: {min(shared)!r} is rewired by {other.name!r} and by {self.name!r}; allowed is one of them"
                )
        for name, n in self._planted(fit.sparsity, pl_module).items():
            plant_(fit.sparsity, name, n, generator=self._generator, agree=partial(broadcast, trainer))
        fit.budgets = self._find_budgets(fit.sparsity, pl_module)
        self._note_ways(fit)
        fit.planned = True
        for name in fit.names if self._growth.std == "initial" else ():
            live = fit.sparsity.tensors[name].detach()
            live = live if masks[name].all_live else live[masks[name].live]
            self._stds.setdefault(name, float(live.std(correction=0)) if live.numel() else 0.0)

    def _planted(self, sparsity: Sparsity, pl_module: LightningModule) -> dict[str, int]:
        """Return how many connections each layer begins with that is not sparse yet."""
        planted: dict[str, int] = {}
        for pattern, group in resolve(pl_module, self.targets).items():
            dense = {target.name: target for target in group if _is_dense(sparsity, target)}
            shapes = {name: tuple(target.axes.view(target.parameter).shape[1:]) for name, target in dense.items()}
            if isinstance(self.targets, list):
                planted |= {
                    name: min(
                        target.parameter.numel(),
                        math.prod(shapes[name][2:]) * n_connections(shapes[name][1], shapes[name][0], self.epsilon),
                    )
                    for name, target in dense.items()
                }
                continue
            sizes = {name: target.parameter.numel() for name, target in dense.items()}
            wanted = self.targets[pattern]
            if self.distribution == "uniform":
                planted |= {name: n_keep(wanted, size, name) for name, size in sizes.items()}
            elif dense:
                total = n_keep(wanted, sum(sizes.values()), pattern)
                planted |= shared_out(shapes, total, self.distribution)
        return {name: planted[name] for name in sorted(planted)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that it is known when to act, and that it is not too late."""
        super().on_train_start(trainer, pl_module)
        fit = self._running()
        self._gradients = {
            name: _to_device(gradient, fit.sparsity.tensors[name].device) for name, gradient in self._gradients.items()
        }
        if self._growth.window and any(getattr(other, "shrink", False) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                f"growth is {self._growth.kind!r}, which remembers gradients, but shrink is True in another callback; "
                "allowed is growth='random', or shrink=False"
            )
        if self.every != "epoch" and self.every >= _n_steps(trainer):
            warnings.warn(
                f"{self.name}: every is {self.every}, but the run has {_n_steps(trainer):.0f} optimizer steps: nothing will "
                "be rewired; lower it, or train longer",
                stacklevel=2,
            )
        if isinstance(self.zeta, Decay) and not math.isfinite(_n_steps(trainer)):
            raise ValueError(
                f"zeta is {self.zeta}, which ends after a fraction of the run, whose number of optimizer steps is not known "
                "here; allowed is a float, or max_steps or max_epochs on the Trainer"
            )
        if self.every == "epoch" and self._growth.window and not math.isfinite(trainer.num_training_batches):
            raise ValueError(
                f"growth is {self._growth.kind!r}, which looks at an epoch's last batches, but the number of batches is not "
                "known; allowed is every=N, or growth='random'"
            )

    def _plan(self, fit: Fit) -> None:
        """Do nothing: it is known what is done when, whatever the network looks like."""

    def _when(self, fit: Fit, budget: Budget) -> str:
        time = "after every epoch" if self.every == "epoch" else f"every {self.every:,} optimizer steps"
        return f"{time}, zeta: {in_words(self.zeta)}; {in_words(self._growth)}"

    # Watching

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the gradients, if connections grow by them soon."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        fit = self._running()
        fit.watching.close()
        if not self._is_watched(trainer, batch_idx):
            return
        names = {name for name in fit.names if isinstance(fit.sparsity.masks[name], ListMask)}
        listed = {name: layer for name, layer in layers_of(pl_module).items() if name in names}
        if listed:
            fit.watching.enter_context(running_eagerly(pl_module))
        for name, layer in listed.items():
            hook = layer.register_forward_hook(partial(self._watch, name), with_kwargs=True)
            fit.watching.callback(hook.remove)

    def _is_watched(self, trainer: Trainer, batch_idx: int) -> bool:
        window = self._growth.window
        if self.every == "epoch":
            together: int = trainer.accumulate_grad_batches
            steps_left: float = -(-trainer.num_training_batches // together) - batch_idx // together
            return steps_left <= window
        return bool(window and self.every - self._step % self.every < window + self._stride)

    def _watch(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not output.requires_grad or not layer.get_parameter("weight").requires_grad:  # another optimizer's turn
            return
        x = (args[0] if args else kwargs["input"]).detach()
        x = x.reshape(-1, x.shape[-1])  # (row, input)
        base = output._base  # (unit, row), which an activation that works in place changes
        if base is not None and (base.grad_fn is None or base.shape != (output.shape[-1], len(x))):
            base = None

        def keep(gradient: Tensor) -> None:
            self._forget_skipped()
            factors = self._pending.setdefault(name, [])
            assert isinstance(factors, list)
            rows = gradient.reshape(len(x), -1) if base is None else gradient.t()
            factors.append(Factors(rows.detach(), x, 1.0))

        (output if base is None else base).register_hook(keep)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off, so that the module can be copied."""
        if pl_module.automatic_optimization:
            self._running().watching.close()

    def _before_masking(self, fit: Fit, optimizer: Optimizer) -> None:
        if not self._is_watched(fit.trainer, fit.trainer.fit_loop.epoch_loop.batch_idx):
            return
        self._forget_skipped()
        scaler = getattr(fit.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        for name, pending in self._pending.items():
            if isinstance(pending, list) and optimizer_of([optimizer], fit.sparsity.tensors[name]) is not None:
                self._pending[name] = [part._replace(scale=part.scale / scale) for part in pending]
        self._is_complete = optimizer_of([optimizer], fit.sparsity.tensors[fit.names[0]]) is not None
        for name in fit.names:
            parameter = fit.sparsity.tensors[name]
            dense = not isinstance(fit.sparsity.masks[name], ListMask)
            if dense and parameter.grad is not None and optimizer_of([optimizer], parameter) is not None:
                self._pending[name] = parameter.grad.detach().clone()

    def _forget_skipped(self) -> None:
        """Forget the gradients of a step that was to be made, and was not."""
        if self._is_complete:
            self._pending, self._is_complete = {}, False

    def _count_step(self, optimizer: Optimizer, *rest: Any) -> None:
        before = self._step
        super()._count_step(optimizer, *rest)
        if self._step > before:
            self._take_in()

    def _take_in(self) -> None:
        """Take in the gradients of the step that was just made."""
        for name, new in self._pending.items():
            old = self._gradients.get(name)
            if isinstance(new, Tensor):
                self._gradients[name] = new if old is None or self._growth.window == 1 else new.add_(old, alpha=MEMORY)  # type: ignore[arg-type]
            else:
                aged = [part._replace(scale=MEMORY * part.scale) for part in old or ()]
                self._gradients[name] = new if self._growth.window == 1 else aged + new
        self._pending, self._is_complete = {}, False

    # Rewiring

    @torch.no_grad()
    def _after_step(self, fit: Fit) -> None:
        fit.watching.close()
        self._stride = self._step - self._handled_step
        is_last = _is_last_batch(fit.trainer)
        is_due = self.every != "epoch" and self._step // self.every > self._handled_step // self.every
        if is_due and not is_last:
            self._rewire(fit)

    @torch.no_grad()
    def _between_epochs(self, fit: Fit) -> None:
        if self.every == "epoch":
            self._rewire(fit)

    def _rewire(self, fit: Fit) -> None:
        zeta = float(self.zeta(self._step, _n_steps(fit.trainer)) if isinstance(self.zeta, Decay) else self.zeta)
        agree = partial(broadcast, fit.trainer) if fit.trainer.world_size > 1 else None
        exchanged = 0
        if zeta == 0:  # a Decay has ended
            self._gradients, self._last = {}, (zeta, 0)
            return
        for name in sorted(fit.names):
            if self._growth.kind != "random" and name not in self._gradients:
                warnings.warn(
                    f"{self.name}: growth is {self._growth.kind!r}, but no gradient of {name!r} was seen in the last batches "
                    f"before step {self._step}: it is not rewired this time",
                    stacklevel=2,
                )
                continue
            with self._naming_errors():
                exchanged += rewire_(
                    fit.sparsity,
                    name,
                    zeta,
                    std=self._stds[name] if self._growth.std == "initial" else self._growth.std,
                    gradient=self._gradients.get(name),
                    optimizers=fit.optimizers,
                    generator=self._generator,
                    agree=agree,
                )
        self._gradients = {}
        self._last = (zeta, exchanged)

    def _values(self, fit: Fit) -> dict[str, float]:
        zeta, exchanged = self._last
        return {**self._layer_values(fit), "zeta": zeta, "exchanged": exchanged}


def _n_steps(trainer: Trainer) -> float:
    """Return how many optimizer steps the run has, infinity if that is not known."""
    total: float = trainer.estimated_stepping_batches
    return total if total >= 0 else math.inf


def _is_last_batch(trainer: Trainer) -> bool:
    """Tell whether the run ends with this batch."""
    at_max_steps = 0 <= trainer.max_steps <= trainer.global_step
    return at_max_steps or bool(trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)


def _is_dense(sparsity: Sparsity, target: Target) -> bool:
    """Tell whether nothing of a weight rests or is removed yet."""
    mask = sparsity.masks[target.name]
    return not isinstance(mask, ListMask) and mask.all_live


def _to_state(gradient: Tensor | list[Factors]) -> Any:
    on_cpu = _to_device(gradient, torch.device("cpu"))
    return on_cpu if isinstance(on_cpu, Tensor) else [list(part) for part in on_cpu]


def _to_device(gradient: Tensor | list[Factors], device: torch.device) -> Tensor | list[Factors]:
    if isinstance(gradient, Tensor):
        return gradient.to(device)
    return [Factors(part.output_gradient.to(device), part.x.to(device), part.scale) for part in gradient]


def _from_state(state: Any) -> Tensor | list[Factors]:
    return state if isinstance(state, Tensor) else [Factors(*part) for part in state]
