"""The certificate: against all permutations, closed forms, and its own level."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from lightning_cpna import Certificate, certificate, certify


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_p_value_is_that_of_all_permutations() -> None:
    losses = torch.rand(3, 6, 2, dtype=torch.float64)  # (try, example, label)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    def lowest(chosen: Tensor) -> float:
        return float(losses[:, torch.arange(6), chosen].mean(dim=1).min())

    as_low = [lowest(labels[list(order)]) <= lowest(labels) + 1e-12 for order in itertools.permutations(range(6))]
    exact = sum(as_low) / len(as_low)
    found = certify(losses, labels, 0.0004, generator())
    assert found.loss == pytest.approx(lowest(labels))
    n = 1 / 0.0004 if found.holds else 1000
    assert found.p_value == pytest.approx(exact, abs=4 * (exact * (1 - exact) / n) ** 0.5)


@pytest.mark.parametrize("by_heart", [0.0, 0.05, 1.0])
def test_it_is_false_as_often_as_its_level_whatever_the_tries_learned(by_heart: float) -> None:
    """Tries that know some of the other examples by heart are wild on these: their losses are not normal at all."""
    false = 0
    for seed in range(400):
        draw = generator(seed)
        wild = 1 + 20 * (torch.rand(16, 1, 1, generator=draw) < by_heart)
        losses = wild * torch.rand(16, 30, 2, generator=draw, dtype=torch.float64)
        labels = torch.randint(2, (30,), generator=draw)
        false += certify(losses, labels, 0.05, draw).holds
    assert false / 400 == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / 400) ** 0.5)


def test_one_try_among_many_that_learned_is_enough() -> None:
    labels = torch.randint(3, (60,), generator=generator())
    losses = torch.rand(100, 60, 3, dtype=torch.float64)
    losses[41] = torch.nn.functional.one_hot(labels, 3) * -0.6 + torch.rand(60, 3)
    found = certify(losses, labels, 1e-4, generator())
    assert found.holds
    assert found.p_value == pytest.approx(1 / 10_001)
    assert found.margin > 5


def test_tries_that_all_say_the_same_of_every_example_prove_nothing() -> None:
    found = certify(torch.ones(5, 20, 2, dtype=torch.float64), torch.tensor([0, 1] * 10), 0.01, generator())
    assert found.p_value == 1
    assert not found.holds
    assert found.margin == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("says", [(0.3, 0.7), (-0.1, 0.1), (1e6 + 0.1, 1e6 - 0.1)])
def test_tries_that_do_not_tell_examples_apart_are_never_certified(
    says: tuple[float, float], dtype: torch.dtype
) -> None:
    """All orders then have the same loss, but for the rounding of its sum."""
    for seed in range(20):
        labels = torch.tensor([0, 1] * 150)[torch.randperm(300, generator=generator(seed))]
        found = certify(torch.tensor(says, dtype=dtype).expand(2, 300, 2), labels, 0.001, generator(seed))
        assert found.p_value == 1


def test_a_loss_that_sums_up_to_nothing_is_no_find() -> None:
    for seed in range(20):
        outputs = torch.randn(2, 150, generator=generator(seed), dtype=torch.float64)
        losses = torch.cat([outputs, -outputs], dim=1)[:, :, None].expand(2, 300, 2)  # whatever the labels are
        labels = torch.tensor([0, 1] * 150)[torch.randperm(300, generator=generator(seed))]
        assert certify(losses, labels, 0.001, generator(seed)).p_value == 1


def test_tries_without_a_finite_loss_are_left_out() -> None:
    labels = torch.tensor([0, 1] * 10)
    losses = torch.rand(3, 20, 2, dtype=torch.float64)
    with_failed = torch.cat([losses, torch.full((2, 20, 2), torch.nan)])
    assert certify(with_failed, labels, 0.01, generator()) == certify(losses, labels, 0.01, generator())
    diverged = torch.stack(
        [torch.full((20, 2), value, dtype=torch.float64) for value in (-torch.inf, torch.nan, torch.inf)]
    )
    kept, expected = (
        vars(certify(some, labels, 0.01, generator())) for some in (torch.cat([losses, diverged]), losses)
    )
    assert kept == pytest.approx(expected, rel=1e-12)
    for failed in (with_failed[3:], diverged, diverged[2:]):
        with pytest.raises(ValueError, match="no try ended with a finite loss"):
            certify(failed, labels, 0.01, generator())


def test_a_try_that_excludes_the_wrong_labels_is_certified() -> None:
    labels = torch.tensor([0, 1] * 20)
    never = torch.eye(2).logical_not().double()[labels] * torch.inf  # inf * 0 is NaN
    perfect = never.nan_to_num(nan=0.0, posinf=torch.inf)
    found = certify(perfect[None], labels, 0.01, generator())
    assert found.holds
    assert found.loss == 0
    assert found.chance_loss == found.chance_spread == found.margin == torch.inf


def test_chance_is_infinite_where_one_permutation_is() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    labels[-1] = 1  # so that one permutation of forty meets what is infinite
    losses = torch.rand(1, 40, 2, generator=generator(), dtype=torch.float64)
    losses[0, 0, 1] = torch.inf
    found = certify(losses, labels, 0.01, generator())
    assert found.chance_loss == found.chance_spread == found.margin == torch.inf


def test_few_permutations_at_a_time_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(2, (40,), generator=generator())
    learned = torch.nn.functional.one_hot(labels, 2)[None] * -0.9 + torch.rand(3, 40, 2, dtype=torch.float64)
    noise = torch.rand(3, 40, 2, generator=generator(), dtype=torch.float64)
    together = certify(learned, labels, 0.01, generator(1))
    monkeypatch.setattr(certificate, "MAX_MARKS", 1)  # one at a time
    one_by_one = certify(learned, labels, 0.01, generator(1))
    assert dataclasses.astuple(one_by_one) == pytest.approx(dataclasses.astuple(together), rel=1e-9)

    def lowest(chosen: Tensor) -> float:
        return float(noise[:, torch.arange(40), chosen].mean(dim=1).min())

    draw, n_drawn, is_lower = generator(1), 0, False
    while not is_lower:
        n_drawn += 1
        is_lower = lowest(labels[torch.rand(1, 40, generator=draw).argsort(dim=1)[0]]) <= lowest(labels)
    assert certify(noise, labels, 0.01, generator(1)).p_value == pytest.approx(2 / (1 + n_drawn))


def test_a_single_permutation_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "MAX_MARKS", 1)
    labels = torch.tensor([0, 1] * 20)
    found = certify(torch.ones(1, 40, 2, dtype=torch.float64), labels, 0.01, generator())
    assert (found.p_value, found.chance_spread, found.margin) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 3, 4]])
def test_orders_are_counted_as_by_writing_them_all_down(labels: list[int]) -> None:
    expected = len(set(itertools.permutations(labels)))
    assert certificate.n_orders(torch.tensor(labels)) == pytest.approx(expected, rel=1e-12)


def test_orders_that_are_more_than_a_float_can_hold_are_infinite() -> None:
    assert certificate.n_orders(torch.arange(200)) == torch.inf


@pytest.mark.parametrize(
    ("losses", "labels", "message"),
    [
        (torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), r"losses has shape \(4, 2\) and type torch.float32"),
        (torch.ones(1, 4, 2).long(), torch.tensor([0, 1, 0, 1]), "type torch.int64; allowed are floats"),
        (
            torch.rand(1, 4, 2),
            torch.tensor([0, 1, 0]),
            r"labels has shape \(3,\).*allowed are int64 from 0 to 1, \(4,\)",
        ),
        (torch.rand(1, 4, 2), torch.tensor([0, 1, 0, 2]), r"values \[0, 1, 2\]; allowed are int64 from 0 to 1"),
        (torch.rand(1, 4, 2), torch.tensor([0, 1, 0, -1]), r"values \[-1, 0, 1\]"),
        (torch.rand(1, 4, 2), torch.tensor([0.0, 1.0, 0.0, 1.0]), "type torch.float32"),
    ],
)
def test_losses_and_labels_that_do_not_fit_are_named(losses: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(losses, labels, 0.01, generator())


@pytest.mark.parametrize("level", [0.0, 1.0, 2.0, -0.1])
def test_a_level_out_of_range_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=rf"level is {level}; allowed is a float in \(0, 1\)"):
        certify(torch.rand(1, 4, 2), torch.tensor([0, 1, 0, 1]), level, generator())


def test_a_margin_is_counted_in_standard_deviations() -> None:
    assert Certificate(1.0, 2.0, 0.25, 0.001, 0.01).margin == 4.0
    assert Certificate(1.0, 2.0, 0.25, 0.01, 0.01).holds
    assert not Certificate(1.0, 2.0, 0.25, 0.011, 0.01).holds
