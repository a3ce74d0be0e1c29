"""Sweeps: one function over many settings, in parallel processes or on a Ray cluster, and no finished run twice."""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Backend = Literal["loky", "ray"]
Setting = Mapping[str, Any]
Row = dict[str, Any]
RunFunction = Callable[..., Mapping[str, Any] | Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Failure:
    """A run that raised, or was under way when a process died.

    Attributes:
        setting: The arguments that it had.
        error: The type of the error and what it says.
        traceback: Where it was raised; empty if the process died.
    """

    setting: dict[str, Any]
    error: str
    traceback: str


class SweepError(RuntimeError):
    """Some runs of a sweep failed, while all others were finished and saved.

    Attributes:
        failures: The runs that failed.
        rows: The results of the others.
    """

    def __init__(self, failures: Sequence[Failure], rows: Sequence[Row], n_runs: int) -> None:
        self.failures, self.rows = tuple(failures), list(rows)
        named = "".join(f"\n  {json.dumps(failure.setting)}: {failure.error}" for failure in failures)
        first = f"\n{failures[0].traceback}" if failures[0].traceback else ""
        super().__init__(f"{len(failures)} of {n_runs} runs failed; the others are finished and saved:{named}{first}")


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Return every combination of values, the last name's changing fastest.

    Examples:
        >>> grid(hidden=[16, 32], seed=[0])
        [{'hidden': 16, 'seed': 0}, {'hidden': 32, 'seed': 0}]
    """
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def sweep(
    function: RunFunction,
    settings: Iterable[Setting],
    folder: str | Path,
    *,
    n_jobs: int = -1,
    backend: Backend = "loky",
    title: str = "sweep",
    console: Console | None = None,
) -> list[Row]:
    """Call a function with every setting, and return what it found as tidy rows.

    A finished run is a JSON file in the folder, named by a hash of the function's name and the setting; it is never run
    again, so that a sweep that was killed goes on where it was. Where the function has changed since, take another folder.
    The file is there only once it is whole. Every run computes with one torch thread, so that its numbers depend on neither
    the number of processes nor the backend. A run must take all randomness from its setting (a seed) for that to hold.

    If a process of this machine dies (out of memory, say), the others go on in new ones, and what was under way is run
    once more, each alone; a run whose process dies then, too, has failed.

    Args:
        function: Called as ``function(**setting)``; returns a mapping or several, of names to JSON values. It is one that a
            module or script defines at its top level. Arguments that ``functools.partial`` binds (a data folder) are not
            part of what identifies a run.
        settings: JSON values by name.
        folder: Where finished runs are kept; on a cluster, a folder that all machines share.
        n_jobs: How many runs at a time; -1: as many as there are cores, in the machine or the cluster; 1: one after the other
            in this process, which a run that kills its process then ends, too.
        backend: "loky": processes of this machine. "ray": the Ray cluster that ``RAY_ADDRESS`` names or ``ray.init`` has
            joined, else a local one.
        title: What the progress bar says.
        console: Where the progress bar, with the time left, is drawn.

    Returns:
        For each setting, in order, what its run returned: rows of the setting's entries and the result's.

    Raises:
        ValueError: If two settings are equal, or an argument is out of range.
        TypeError: If a setting holds anything but JSON values, or the function is not at the top level of a module.
        ImportError: If joblib, or Ray for ``backend="ray"``, is not installed.
        SweepError: If runs failed, once all others are finished. They are run again the next time.

    Examples:
        >>> import tempfile
        >>> def square(x):
        ...     return {"square": x * x}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sweep(square, grid(x=[2, 3]), folder, n_jobs=1, console=Console(quiet=True))
        [{'x': 2, 'square': 4}, {'x': 3, 'square': 9}]
    """
    joblib = _joblib()
    _check_workers(n_jobs, backend)
    if isinstance(settings, Mapping):
        raise TypeError("settings is a mapping; allowed are several mappings, one a run, as grid(...) returns them")
    folder = Path(folder).absolute()
    files = _files(function, [dict(setting) for setting in settings], folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = {file: setting for file, setting in files.items() if not file.is_file()}
    for part in folder.glob("*.json.*.part"):
        if part.with_name(f"{part.name.split('.')[0]}.json") in missing:
            part.unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=len(missing))

        class Parallel(joblib.Parallel):  # type: ignore[misc, name-defined]
            def __call__(self, runs: Iterable[Any]) -> Any:
                self.before = sum(file.is_file() for file in missing)
                return super().__call__(runs)

            def print_progress(self) -> None:
                progress.update(task, completed=self.before + self.n_completed_tasks)

        if backend == "ray":
            _register_ray()
        with joblib.parallel_config(backend=backend):
            run = partial(_run, function, owner=os.getpid() if backend == "loky" else None)
            failures = _run_all(Parallel(n_jobs=n_jobs), joblib.delayed(run), missing)
    failed = [failure.setting for failure in failures]
    if lost := [setting for file, setting in missing.items() if not file.is_file() and setting not in failed]:
        raise RuntimeError(
            f"{len(lost)} runs left no file in {folder}, which must be on all machines; one is {lost[0]}"
        )
    rows = [row for file in files if file.is_file() for row in _read(file)]
    if failures:
        raise SweepError(failures, rows, len(files))
    return rows


def save_rows(rows: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """Write rows as a table; return the file.

    Args:
        rows: Entries by column name; a column that a row lacks is empty in it, and so is one that is None or NaN.
        file: Its ending says how: ``.csv`` or ``.parquet``; its folder is made if need be.

    Raises:
        ValueError: If the ending is another, there are no rows, or an entry is a list or mapping.
        ImportError: If pandas, or pyarrow for Parquet, is not installed.
    """
    import pandas as pd

    file, rows = _table(file), list(rows)
    if not rows:
        raise ValueError("rows is empty; allowed is at least one")
    for row in rows:
        if nested := [name for name, value in row.items() if isinstance(value, list | tuple | Mapping)]:
            raise ValueError(
                f"rows: {nested[0]!r} is {row[nested[0]]!r}; allowed are single values, no lists or mappings"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).convert_dtypes()
    unfinished = file.with_name(file.name + ".part")
    if file.suffix == ".csv":
        table.to_csv(unfinished, index=False, lineterminator="\n")
    else:
        table.to_parquet(unfinished, index=False)
    os.replace(unfinished, file)
    return file


def load_rows(file: str | Path) -> list[Row]:
    """Read what `save_rows` wrote; a row has no entry where its column is empty, as it is for None and NaN.

    A CSV file has no types: a column of which every value reads as a number is one of numbers, of whole ones if all are.

    Raises:
        ValueError: If the file's ending is neither ``.csv`` nor ``.parquet``.
        ImportError: If pandas, or pyarrow for Parquet, is not installed.
    """
    import pandas as pd

    file = _table(file)
    is_csv = file.suffix == ".csv"
    table = pd.read_csv(file, keep_default_na=False, na_values=[""]) if is_csv else pd.read_parquet(file)
    records = table.convert_dtypes().to_dict("records")
    return [{str(name): value for name, value in record.items() if not pd.isna(value)} for record in records]


def log_hparams(rows: Iterable[Row], hparams: Sequence[str], metrics: Sequence[str], folder: str | Path) -> None:
    """Write rows for TensorBoard's HParams page, a run each.

    Args:
        rows: What a sweep returned.
        hparams: The columns that are hyper-parameters.
        metrics: The columns that are results.
        folder: The log directory; runs in it are named by their hyper-parameters, and replace earlier ones of that name.

    Raises:
        ValueError: If a row lacks a column or has no number as a metric, or two rows have the same hyper-parameters.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams as summaries

    named: dict[str, Row] = {}
    for row in rows:
        if missing := [key for key in (*hparams, *metrics) if key not in row]:
            raise ValueError(f"rows: one has no {missing[0]!r}; it has {', '.join(map(repr, row))}")
        if texts := [key for key in metrics if not isinstance(row[key], Real)]:
            raise ValueError(f"metrics: {texts[0]!r} is {row[texts[0]]!r} in a row; allowed are numbers")
        name = ",".join(f"{key}={row[key]}" for key in hparams).replace("/", "_")
        if name in named:
            raise ValueError(
                f"two rows have the hyper-parameters {name}; average them first, or add what tells them apart"
            )
        named[name] = row
    for name, row in named.items():
        run = Path(folder) / name
        if run.exists():
            shutil.rmtree(run)
        values = {f"hparam/{key}": row[key] for key in metrics}
        with SummaryWriter(str(run)) as writer:
            for summary in summaries({key: row[key] for key in hparams}, values):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)
            for key, value in values.items():
                writer.add_scalar(key, value)


def n_workers(n_jobs: int, backend: Backend) -> int:
    """Return how many runs a sweep makes at a time."""
    joblib = _joblib()
    _check_workers(n_jobs, backend)
    if backend == "ray":
        _register_ray()
    with joblib.parallel_config(backend=backend):
        return int(joblib.effective_n_jobs(n_jobs))


def _check_workers(n_jobs: int, backend: Backend) -> None:
    if backend not in ("loky", "ray"):
        raise ValueError(f"backend is {backend!r}; allowed is one of 'loky', 'ray'")
    if type(n_jobs) is not int or (n_jobs != -1 and n_jobs < 1):
        raise ValueError(f"n_jobs is {n_jobs!r}; allowed is -1, or an int >= 1")


def _files(function: RunFunction, settings: list[dict[str, Any]], folder: Path) -> dict[Path, dict[str, Any]]:
    """Name the file of every setting."""
    name, files = _name(function), {}
    for setting in settings:
        try:
            text = json.dumps([name, setting], sort_keys=True)
        except TypeError as error:
            raise TypeError(f"setting {setting}: {error}; allowed are JSON values") from error
        if json.loads(text)[1] != setting:
            raise TypeError(f"setting {setting} changes when it is saved as JSON; allowed are JSON values, with lists")
        file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if file in files:
            raise ValueError(f"settings has {setting} twice; allowed is each once")
        files[file] = setting
    return files


def _table(file: str | Path) -> Path:
    file = Path(file)
    if file.suffix not in (".csv", ".parquet"):
        raise ValueError(f"file is {file}; allowed is one that ends in .csv or .parquet")
    return file


def _name(function: Any) -> str:
    """Name a function so that no other has its name: by its module, or the script's file."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        raise TypeError(f"function is {function!r}; allowed is one that a module or script defines at its top level")
    module = function.__module__
    script = getattr(sys.modules.get(module), "__file__", None) if module == "__main__" else None
    return f"{Path(script).name if script else module}.{name}"


def _parts(file: Path) -> list[Path]:
    """Find what runs have begun to write and not ended."""
    return list(file.parent.glob(f"{file.name}.*.part"))


def _run_all(parallel: Any, run: Any, missing: dict[Path, dict[str, Any]]) -> list[Failure]:
    """Run settings; where a process dies, go on with what was not begun, then with each that was under way alone."""
    failures: list[Failure] = []
    groups = [missing]
    while groups:
        group = groups.pop(0)
        try:
            found = parallel(run(file, setting) for file, setting in group.items())
            failures += [failure for failure in found if failure is not None]
        except BrokenProcessPool as error:
            left = {file: setting for file, setting in group.items() if not file.is_file()}
            begun = [file for file in left if _parts(file)]
            if not begun:
                raise
            if len(group) == 1:
                failures += [Failure(left[file], f"{type(error).__name__}: its process died", "") for file in begun]
            else:
                groups += [{file: left[file]} for file in begun]
                groups.insert(0, {file: setting for file, setting in left.items() if file not in begun})
    return failures


def _run(function: RunFunction, file: Path, setting: dict[str, Any], owner: int | None) -> Failure | None:
    """Run one setting and save its rows; as long as it is under way, its unfinished file is there.

    Where the owner, the process of the sweep, was killed, its workers begin nothing more.
    """
    if owner is not None and owner not in (os.getpid(), os.getppid()):
        return None
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    unfinished.touch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = function(**copy.deepcopy(setting))
        rows = [dict(row) for row in _mappings(found)]
        for row in rows:
            if other := {name for name in set(row) & set(setting) if row[name] != setting[name]}:
                raise ValueError(f"the result has other values of {sorted(other)} than the setting")
            _check_json(row)
        unfinished.write_text(json.dumps({"setting": setting, "rows": rows}) + "\n")
        os.replace(unfinished, file)
    except Exception as error:  # whatever the user's function raises is named when the sweep ends
        return Failure(setting, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        unfinished.unlink(missing_ok=True)
        torch.set_num_threads(threads)
    return None


def _mappings(found: Any) -> list[Mapping[str, Any]]:
    several = [found] if isinstance(found, Mapping) else list(found) if isinstance(found, Iterable) else [found]
    if wrong := [one for one in several if not isinstance(one, Mapping)]:
        raise TypeError(f"the result is or has a {type(wrong[0]).__name__}; allowed are one or several mappings")
    return several


def _check_json(row: Row) -> None:
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"the result's {name!r} is a {type(value).__name__}; allowed are JSON values, as float(...) makes them"
            ) from error


def _read(file: Path) -> list[Row]:
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and its run is made again") from error
    return [{**content["setting"], **row} for row in content["rows"]]


def _joblib() -> Any:
    try:
        import joblib
    except ImportError as error:
        raise ImportError("sweeps need joblib: pip install 'lightning-cpna[sweeps]'") from error
    return joblib


def _register_ray() -> None:
    try:
        ray_joblib: Any = importlib.import_module("ray.util.joblib")
    except ImportError as error:
        raise ImportError("backend='ray' needs Ray: pip install 'lightning-cpna[ray]'") from error
    ray_joblib.register_ray()
