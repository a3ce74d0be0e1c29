"""Sweeps: against a plain loop, against an undisturbed sweep, and what they refuse."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("joblib", reason="the extra 'sweeps' is not installed")
pytest.importorskip("pandas", reason="the extra 'sweeps' is not installed")

from lightning_cpna.sweeps import SweepError, grid, load_rows, log_hparams, save_rows, sweep


def product(seed: int, n: int, log: Path | None = None) -> dict[str, Any]:
    """A little training: its number depends on the seed, and would depend on the number of threads."""
    if log is not None:
        with log.open("a") as file:
            file.write(f"{seed} {n}\n")
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator)
    return {"sum": float((a @ a).softmax(1)[:, 0].sum()), "threads": torch.get_num_threads()}


def parts(seed: int) -> list[dict[str, Any]]:
    return [{"fold": fold, "value": 10 * seed + fold} for fold in range(2)]


def dies_at_two(seed: int) -> dict[str, Any]:
    if seed == 2:
        os._exit(1)
    time.sleep(0.05)
    return {"value": seed}


def changes_folder(seed: int, to: Path) -> dict[str, Any]:
    os.chdir(to)
    return {"value": seed}


class Callable:
    def run(self, seed: int) -> dict[str, Any]:
        return {"value": seed}

    __call__ = run


def fails_at_two(seed: int, log: Path) -> dict[str, Any]:
    product(seed, 2, log)
    if seed == 2 and not log.with_suffix(".mended").exists():
        raise ZeroDivisionError("two")
    return {"value": seed}


SETTINGS = grid(n=[3, 200], seed=[0, 1, 2])


def test_a_grid_is_every_combination_in_order() -> None:
    assert grid(a=[1, 2], b=["x", "y"]) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_rows_are_a_plain_loops(tmp_path: Path, n_jobs: int) -> None:
    expected = [setting | product(**setting) for setting in SETTINGS]
    assert all(row["threads"] == 1 for row in expected)
    assert sweep(product, SETTINGS, tmp_path, n_jobs=n_jobs) == expected


def test_a_run_may_return_several_rows(tmp_path: Path) -> None:
    assert sweep(parts, grid(seed=[3, 1]), tmp_path, n_jobs=1) == [
        {"seed": 3, "fold": 0, "value": 30},
        {"seed": 3, "fold": 1, "value": 31},
        {"seed": 1, "fold": 0, "value": 10},
        {"seed": 1, "fold": 1, "value": 11},
    ]


def test_runs_use_one_thread_and_leave_the_number_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        rows = sweep(product, SETTINGS[:1], tmp_path, n_jobs=1)
        assert rows[0]["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = sweep(partial(product, log=log), SETTINGS[:4], tmp_path / "runs", n_jobs=1)
    both = sweep(partial(product, log=log), SETTINGS, tmp_path / "runs", n_jobs=1)
    assert both[:4] == first
    assert log.read_text().split("\n")[:-1] == [f"{setting['seed']} {setting['n']}" for setting in SETTINGS]


def test_what_partial_binds_does_not_tell_runs_apart_but_the_function_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sweep(partial(product, log=log), SETTINGS[:1], tmp_path / "runs", n_jobs=1)
    log.unlink()
    sweep(partial(product, log=log), SETTINGS[:1], tmp_path / "runs", n_jobs=1)
    assert not log.exists()
    sweep(parts, grid(seed=[0]), tmp_path / "runs", n_jobs=1)
    sweep(partial(fails_at_two, log=log), grid(seed=[0]), tmp_path / "runs", n_jobs=1)
    assert log.exists()
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3


def test_a_half_written_run_is_run_again(tmp_path: Path) -> None:
    rows = sweep(product, SETTINGS[:1], tmp_path, n_jobs=1)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f"{file.name}.123.part")
    assert sweep(product, SETTINGS[:1], tmp_path, n_jobs=1) == rows
    assert file.is_file()


def test_failures_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = partial(fails_at_two, log=log)
    with pytest.raises(SweepError, match=r'1 of 4 runs failed.*\n  {"seed": 2}: ZeroDivisionError: two') as caught:
        sweep(run, grid(seed=[1, 2, 3, 4]), tmp_path / "runs", n_jobs=1)
    assert caught.value.rows == [{"seed": seed, "value": seed} for seed in (1, 3, 4)]
    (failure,) = caught.value.failures
    assert failure.setting == {"seed": 2}
    assert "raise ZeroDivisionError" in failure.traceback
    log.unlink()
    log.with_suffix(".mended").touch()
    assert [row["value"] for row in sweep(run, grid(seed=[1, 2, 3, 4]), tmp_path / "runs", n_jobs=1)] == [1, 2, 3, 4]
    assert log.read_text() == "2 2\n"


def test_a_failure_in_another_process_is_named_with_its_traceback(tmp_path: Path) -> None:
    run = partial(fails_at_two, log=tmp_path / "log")
    with pytest.raises(SweepError, match=r"(?s)1 of 3 runs failed.*ZeroDivisionError: two\nTraceback.*fails_at_two"):
        sweep(run, grid(seed=[1, 2, 3]), tmp_path / "runs", n_jobs=2)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_where_a_process_dies_its_run_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    with pytest.raises(SweepError, match=r'1 of 8 runs failed.*\n  {"seed": 2}: TerminatedWorkerError') as caught:
        sweep(dies_at_two, grid(seed=range(8)), tmp_path, n_jobs=2, console=console)
    assert [row["value"] for row in caught.value.rows] == [0, 1, 3, 4, 5, 6, 7]
    assert "7/8" in console.export_text()


def test_the_progress_counts_runs(tmp_path: Path) -> None:
    sweep(product, SETTINGS[:2], tmp_path, n_jobs=1, console=Console(quiet=True))
    console = Console(record=True, width=100, file=io.StringIO())
    sweep(product, SETTINGS, tmp_path, n_jobs=1, title="products", console=console)
    (last,) = console.export_text().strip().split("\n")
    assert last.startswith("products")
    assert "4/4" in last


def test_a_run_may_change_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    run = partial(changes_folder, to=tmp_path / "other")
    assert [row["value"] for row in sweep(run, grid(seed=[1, 2]), "runs", n_jobs=1)] == [1, 2]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2


@pytest.mark.parametrize("function", [lambda seed: {"value": seed}, Callable(), Callable().run])
def test_a_function_that_others_may_be_taken_for_is_refused(tmp_path: Path, function: Any) -> None:
    with pytest.raises(TypeError, match=r"function is <.*; allowed is one that a module or script defines at its top"):
        sweep(function, grid(seed=[1]), tmp_path, n_jobs=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ([{"seed": 1}, {"seed": 1}], ValueError, r"\{'seed': 1\} twice"),
        ([{"seed": torch.tensor(1)}], TypeError, "tensor.*JSON values"),
        ([{"seed": (1, 2)}], TypeError, r"\(1, 2\).*changes when it is saved"),
        ([{"seed": math.nan}], TypeError, "nan.*changes"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(
    tmp_path: Path, settings: list[dict[str, Any]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sweep(parts, settings, tmp_path / "runs", n_jobs=1)
    assert not (tmp_path / "runs").exists()


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend is 'dask'; allowed is one of 'loky', 'ray'"):
        sweep(parts, [], tmp_path, backend="dask")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_jobs is 0; allowed is -1, or an int >= 1"):
        sweep(parts, [], tmp_path, n_jobs=0)
    with pytest.raises(ValueError, match="n_jobs is '1'; allowed is -1, or an int >= 1"):
        sweep(parts, [], tmp_path, n_jobs="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="settings is a mapping; allowed are several mappings"):
        sweep(parts, {"seed": [0]}, tmp_path)  # type: ignore[dict-item]


def returns_a_tensor(seed: int) -> dict[str, Any]:
    return {"value": torch.tensor(seed)}


def returns_nothing(seed: int) -> None:
    return None


def returns_numbers(seed: int) -> list[int]:
    return [seed]


def returns_another_seed(seed: int) -> dict[str, Any]:
    return {"seed": seed + 1}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returns_a_tensor, "the result's 'value' is a Tensor; allowed are JSON values"),
        (returns_nothing, "the result is or has a NoneType; allowed are one or several mappings"),
        (returns_numbers, "the result is or has a int; allowed are one or several mappings"),
        (returns_another_seed, r"the result has other values of \['seed'\]"),
    ],
)
def test_bad_results_are_failures(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        sweep(function, grid(seed=[0]), tmp_path, n_jobs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_saved_rows_are_read_as_they_were(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = [{"set": "a b", "n": 3, "value": 0.1 + 0.2, "odd": True}, {"set": "NA", "n": 4, "value": 1e-300}]
    assert load_rows(save_rows(rows, tmp_path / f"rows.{ending}")) == rows
    assert [path.name for path in tmp_path.iterdir()] == [f"rows.{ending}"]


def test_what_is_no_table_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        save_rows([], tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"rows: 'd' is \[1, 2\]; allowed are single values"):
        save_rows([{"d": [1, 2]}], tmp_path / "rows.csv")
    assert save_rows([{"d": 1}], tmp_path / "new" / "rows.csv").is_file()


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.json; allowed is one that ends in .csv or .parquet"):
        save_rows([], tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"rows.json; allowed is one that ends in .csv or .parquet"):
        load_rows(tmp_path / "rows.json")


def test_tensorboard_reads_the_hyper_parameters_and_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    rows = [{"lr": 0.1, "score": "path", "auc": 0.5, "other": 1}, {"lr": 0.2, "score": "path", "auc": 0.75, "other": 1}]
    for _ in range(2):  # what was there is replaced
        log_hparams(rows, ["lr", "score"], ["auc"], tmp_path)
    found = {}
    for folder in tmp_path.iterdir():
        assert len(list(folder.iterdir())) == 1
        events = EventAccumulator(str(folder)).Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = metadata.parse_session_start_info_plugin_data(content).hparams
        assert hparams["score"].string_value == "path"
        found[hparams["lr"].number_value] = events.Scalars("hparam/auc")[0].value
        assert set(hparams) == {"lr", "score"}
    assert found == {0.1: 0.5, 0.2: 0.75}
    with pytest.raises(ValueError, match="rows: one has no 'los'; it has 'score', 'loss'"):
        log_hparams([{"score": "path", "loss": 1.0}], ["score"], ["los"], tmp_path)
    for bad in ("low", None):
        with pytest.raises(ValueError, match=f"metrics: 'loss' is {bad!r} in a row; allowed are numbers"):
            log_hparams([{"score": "path", "loss": bad}], ["score"], ["loss"], tmp_path)
    with pytest.raises(ValueError, match="two rows have the hyper-parameters score=path"):
        log_hparams(rows, ["score"], ["auc"], tmp_path)


SCRIPT = """
import sys, time
from tests.test_sweeps import product
from lightning_cpna.sweeps import grid, save_rows, sweep

def slow(seed, n):
    time.sleep(0.1)
    return product(seed, n)

if __name__ == "__main__":
    folder, n_jobs, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rows = sweep(slow, grid(n=[3, 50], seed=list(range(8))), folder + "/runs", n_jobs=n_jobs, backend=backend)
    save_rows(rows, folder + "/results.csv")
"""


def start(folder: Path, n_jobs: int, backend: str = "loky") -> subprocess.Popen[bytes]:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(n_jobs), backend], env=environment, start_new_session=True
    )


def kill_when(process: subprocess.Popen[bytes], folder: Path, n_finished: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("runs/*.json"))) < n_finished:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def killed_and_continued(tmp_path: Path, n_jobs: int, moments: list[int]) -> None:
    """Kill a sweep at several moments, go on, and compare its file with that of runs which nothing happened to."""
    disturbed = tmp_path / "disturbed"
    for n_finished in moments:
        kill_when(start(disturbed, n_jobs), disturbed, n_finished)
        assert not (disturbed / "results.csv").exists()
    assert start(disturbed, n_jobs).wait() == 0
    rows = [{**setting, **product(**setting)} for setting in grid(n=[3, 50], seed=list(range(8)))]
    assert load_rows(disturbed / "results.csv") == rows
    assert (disturbed / "results.csv").read_bytes() == save_rows(rows, tmp_path / "undisturbed.csv").read_bytes()


def test_a_sweep_killed_twice_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    killed_and_continued(tmp_path, 1, [2, 9])


@pytest.mark.slow
def test_parallel_sweeps_killed_at_many_moments_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    killed_and_continued(tmp_path, 2, [0, 1, 3, 4, 7, 8, 11, 13, 15])


@pytest.mark.slow
def test_workers_of_a_killed_sweep_begin_nothing_more(tmp_path: Path) -> None:
    process = start(tmp_path / "sweep", 2)
    while len(list(tmp_path.glob("sweep/runs/*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(3)  # thirty runs' time
    assert len(list(tmp_path.glob("sweep/runs/*.json"))) <= 2 + 4, "those that were under way, and some that just ended"


@pytest.mark.slow
def test_two_workers_on_ray_and_on_loky_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    for backend in ("loky", "ray"):
        assert start(tmp_path / backend, 2, backend).wait() == 0
    assert (tmp_path / "ray" / "results.csv").read_bytes() == (tmp_path / "loky" / "results.csv").read_bytes()
