import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_cpna import Annealing, Cubic, EpochFraction, Geometric, Linear, OneShot, Schedule
from lightning_cpna.schedules import n_remaining, resolved_schedule

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000)).map(lambda pair: (max(pair), min(pair)))
WINDOWS = st.tuples(st.integers(0, 50), st.integers(1, 80)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def elapsed(step: int, start: int, every: int) -> int:
    done = 0
    while start + done + every <= step:
        done += every
    return done


def eq2(step: int, start: int, end: int, mu: Fraction, m0: int, k: int) -> int:
    n = 2 * (end - start)
    e = max(0, step - start)
    return k + math.floor((m0 - k) * max(Fraction(0), Fraction(n - 2 * e) / (2 * e * mu + n)))


@given(window=WINDOWS, sizes=SIZES, mu=st.sampled_from([0, 1, 2, 10, 50]))
def test_annealing_equals_equation_2_in_exact_fractions(
    window: tuple[int, int], sizes: tuple[int, int], mu: int
) -> None:
    schedule = Annealing(*window, mu=mu)
    steps = range(2 * window[1])
    assert [schedule.n_remaining(step, *sizes) for step in steps] == [
        eq2(step, *window, Fraction(mu), *sizes) for step in steps
    ]


@pytest.mark.parametrize("end", [3, 7, 10, 60, 100])
@pytest.mark.parametrize("sizes", [(1000, 10), (1000, 200), (60, 3), (12_345_678, 1000), (2**31, 7)])
def test_no_rounding_of_floats_shows_in_any_count(end: int, sizes: tuple[int, int]) -> None:
    n_start, n_end = sizes
    for step in range(end):
        left = 1 - Fraction(step, end)
        assert Linear(0, end).n_remaining(step, *sizes) == n_end + math.floor((n_start - n_end) * left)
        assert Cubic(0, end).n_remaining(step, *sizes) == n_end + math.floor((n_start - n_end) * left**3)
        assert Annealing(0, end).n_remaining(step, *sizes) == eq2(step, 0, end, Fraction(10), *sizes)


@given(window=WINDOWS, sizes=SIZES)
def test_cubic_and_linear_equal_their_formulas_in_exact_fractions(
    window: tuple[int, int], sizes: tuple[int, int]
) -> None:
    (start, end), (n_start, n_end) = window, sizes
    for step in range(2 * end):
        left = 1 - min(Fraction(1), Fraction(max(0, step - start), end - start))
        assert Cubic(start, end).n_remaining(step, *sizes) == n_end + math.floor((n_start - n_end) * left**3)
        assert Linear(start, end).n_remaining(step, *sizes) == n_end + math.floor((n_start - n_end) * left)


@given(window=st.tuples(st.integers(0, 20), st.integers(1, 20)), sizes=SIZES)
def test_geometric_equals_the_largest_integer_below_the_power(window: tuple[int, int], sizes: tuple[int, int]) -> None:
    (start, length), (n_start, n_end) = window, sizes
    for step in range(start, start + length):
        done = step - start
        kept = Geometric(start, start + length).n_remaining(step, *sizes)
        power = n_start ** (length - done) * n_end**done  # (n_start * (n_end / n_start)^t)^length, an integer
        assert kept**length <= power < (kept + 1) ** length


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Annealing(2, 6, mu=1), [13, 13, 13, 9, 6, 4, 3, 3]),  # t = 1/4, 1/2, 3/4: 10 * (3/5, 1/3, 1/7)
        (Annealing(2, 6, mu=0), [13, 13, 13, 10, 8, 5, 3, 3]),
        (Linear(2, 6), [13, 13, 13, 10, 8, 5, 3, 3]),
        (Cubic(2, 6), [13, 13, 13, 7, 4, 3, 3, 3]),  # 10 * (27/64, 1/8, 1/64)
        (OneShot(2), [13, 13, 3, 3, 3, 3, 3, 3]),
        (Linear(2, 6, every=2), [13, 13, 13, 13, 8, 8, 3, 3]),
        (Linear(2, 6, every=3), [13, 13, 13, 13, 13, 5, 3, 3]),
        (Linear(0, 0), [3] * 8),
    ],
)
def test_small_runs_are_literal(schedule: Schedule, expected: list[int]) -> None:
    assert [schedule.n_remaining(step, 13, 3) for step in range(8)] == expected


@pytest.mark.parametrize(("base", "end"), [(10, 4), (10, 10), (2, 30), (3, 20)])
def test_geometric_is_literal_where_the_powers_are_whole(base: int, end: int) -> None:
    counts = [Geometric(0, end).n_remaining(step, base**end, 1) for step in range(end + 2)]
    assert counts == [*(base ** (end - step) for step in range(end)), 1, 1]


@pytest.mark.parametrize("kind", [Annealing, Cubic, Geometric, Linear])
@given(window=WINDOWS, sizes=SIZES, every=st.integers(1, 9))
def test_a_schedule_falls_from_start_to_the_exact_end_every_few_steps(
    kind: type[Schedule], window: tuple[int, int], sizes: tuple[int, int], every: int
) -> None:
    (start, end), (n_start, n_end) = window, sizes
    schedule, each_step = kind(start, end, every), kind(start, end)
    counts = [schedule.n_remaining(step, n_start, n_end) for step in range(end + 5)]
    assert all(isinstance(count, int) for count in counts)
    assert counts[: start + 1] == [n_start] * (start + 1)
    assert counts[end:] == [n_end] * 5
    assert counts == sorted(counts, reverse=True)
    for step in range(start, end):
        assert counts[step] == each_step.n_remaining(start + elapsed(step, start, every), n_start, n_end)


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (Annealing(0.2, 0.6, every=3, mu=4), 500, Annealing(100, 300, every=3, mu=4)),
        (Cubic(0.0, 1.0), 7, Cubic(0, 7)),
        (Linear(10, 0.5), 100, Linear(10, 50)),
        (Geometric(0.25, 90, 2), 100, Geometric(25, 90, 2)),
        (OneShot(0.1), 50, OneShot(5)),
        (Linear(3, 9), 0, Linear(3, 9)),
        (Linear(3, 9), math.inf, Linear(3, 9)),
    ],
)
def test_resolved_schedules_are_literal(schedule: Schedule, total: float, expected: Schedule) -> None:
    assert schedule.resolved(total) == expected
    assert resolved_schedule(schedule, total) == expected


@pytest.mark.parametrize("total", [0, math.inf, math.nan])
def test_a_fraction_of_an_unknown_run_raises_with_the_way_out(total: float) -> None:
    with pytest.raises(ValueError, match=r"end=0\.5 is a fraction of the run.*give end as a step.*max_steps"):
        Annealing(10, 0.5).resolved(total)


def test_a_fraction_that_was_not_resolved_raises() -> None:
    for schedule in (Annealing(0.1, 0.5), Linear(10, 0.5), OneShot(0.5)):
        with pytest.raises(ValueError, match="resolved"):
            schedule.n_remaining(20, 100, 10)


def test_a_fraction_that_ends_before_an_int_start_raises_once_resolved() -> None:
    with pytest.raises(ValueError, match="end is 50; allowed is 80"):
        Linear(80, 0.5).resolved(100)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(Annealing(10, 30), 50), (Cubic(10, 30), 30), (Geometric(10, 30), 30), (Linear(10, 30), 30), (OneShot(10), 10)],
)
def test_the_window_of_equation_2_is_twice_as_long_as_the_descent(schedule: Schedule, expected: int) -> None:
    assert schedule.window_end() == expected


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Linear, {"start": -1}, "start is -1"),
        (Linear, {"start": 1.5}, r"start is 1\.5"),
        (Linear, {"end": -0.5}, r"end is -0\.5"),
        (Cubic, {"end": 1.01}, r"end is 1\.01"),
        (Annealing, {"start": 10, "end": 9}, r"end is 9; allowed is 10 \(start\) or later"),
        (Geometric, {"start": 0.5, "end": 0.4}, r"end is 0\.4; allowed is 0\.5"),
        (Linear, {"every": 0}, "every is 0; allowed is an int >= 1"),
        (Annealing, {"mu": -1.0}, r"mu is -1\.0; allowed is a float >= 0"),
        (OneShot, {"start": -2}, "start is -2"),
        (OneShot, {"start": 3, "every": 0}, "every is 0"),
    ],
)
def test_a_bad_argument_raises_with_its_name_and_value(
    kind: type[Schedule], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)  # type: ignore[arg-type]


def test_schedules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Annealing().start = 3  # type: ignore[misc]


class Squared(Schedule):
    def fraction_left(self, t: float) -> float:
        return (1 - t) ** 2


def test_a_schedule_of_ones_own_needs_only_the_fraction_left() -> None:
    assert [Squared(0, 4).n_remaining(step, 20, 4) for step in range(6)] == [20, 13, 8, 5, 4, 4]


@pytest.mark.parametrize(("answer", "expected"), [(500, 100), (50, 50), (50.0, 50), (10, 10), (-3, 10)])
def test_a_functions_answer_is_clipped_to_the_start_and_end(answer: int, expected: int) -> None:
    kept = n_remaining(lambda step, n_start, n_end: answer, 1, 100, 10)
    assert kept == expected
    assert isinstance(kept, int)


def test_a_function_gets_the_step_and_both_counts_and_is_not_resolved() -> None:
    def schedule(step: int, n_start: int, n_end: int) -> int:
        return n_start - step * n_end

    assert resolved_schedule(schedule, math.inf) is schedule
    assert n_remaining(schedule, 4, 100, 7) == 72


def test_a_function_that_answers_no_whole_number_raises_with_the_answer_and_the_step() -> None:
    with pytest.raises(ValueError, match=r"answered 7\.5 at step 3"):
        n_remaining(lambda step, n_start, n_end: 7.5, 3, 100, 1)  # type: ignore[arg-type, return-value]


def test_asking_a_schedule_through_the_function_is_asking_it() -> None:
    schedule = Cubic(3, 40)
    assert [n_remaining(schedule, step, 99, 4) for step in range(50)] == [
        schedule.n_remaining(step, 99, 4) for step in range(50)
    ]


# Data set, width of both hidden layers, features, neurons that remain (NPSET's Table 3; neurons are inputs and hidden ones).
NPSET = [
    ("Leukemia", 7070, 7000, 9710),
    ("PCMAC", 3289, 3000, 4435),
    ("Lung-discrete", 325, 300, 457),
    ("gisette", 5000, 5000, 6892),
    ("lung", 3312, 3000, 4458),
    ("CLL-SUB-111", 11340, 11000, 15488),
    ("Carcinom", 9182, 9000, 12580),
    ("orlraws10P", 10304, 10000, 14072),
    ("TOX-171", 5748, 5000, 7640),
    ("Prostate-GE", 5966, 5000, 7858),
    ("arcene", 10000, 10000, 13768),
    ("madelon", 500, 1000, 896),
    ("Yale", 1024, 1000, 1420),
    ("GLIOMA", 4434, 4000, 5956),
    ("RELATHE", 4322, 4000, 5844),
]


@pytest.mark.parametrize(("features", "hidden", "neurons"), [row[1:] for row in NPSET], ids=[row[0] for row in NPSET])
def test_the_fraction_leaves_the_neurons_of_npsets_table_3(features: int, hidden: int, neurons: int) -> None:
    assert features + 2 * EpochFraction(0.04, first=10, last=50).n_remaining(60, hidden) == neurons


@pytest.mark.parametrize("epoch", [0, 3, 5, 9])
def test_a_fraction_is_taken_of_what_is_left_and_rounded_down(epoch: int) -> None:
    n = 40
    for i in range(10):
        if 2 <= i <= 6 and i <= epoch:
            n = n - math.floor(n * 3 / 10)
    schedule = EpochFraction(0.3, first=2, last=6)
    assert schedule.n_remaining(epoch, 40) == n
    assert schedule(epoch, 40, 20) == max(20, n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0; allowed is a float in \(0, 1\)"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"first": -1}, "first is -1; allowed is an epoch"),
        ({"first": 3, "last": 2}, r"last is 2; allowed is 3 \(first\) or a later epoch"),
    ],
)
def test_a_fraction_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochFraction(**arguments)
