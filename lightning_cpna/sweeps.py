"""Sweeps: one function over many settings, in parallel processes or on a Ray cluster, and no finished run twice."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    """A run that raised.

    Attributes:
        setting: The arguments that it had.
        error: The type of the error and what it says.
        traceback: Where it was raised.
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
        super().__init__(f"{len(failures)} of {n_runs} runs failed; the others are finished and saved:{named}")


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Return every combination of values, the last name's changing fastest.

    Example:
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
    again, so that a sweep that was killed goes on where it was. The file is there only once it is whole. Every run computes
    with one torch thread, so that its numbers depend on neither the number of processes nor the backend. A run must take
    all randomness from its setting (a seed) for that to hold.

    Args:
        function: Called as ``function(**setting)``; returns a mapping or several, of names to JSON values. It must be
            importable, or picklable by value as joblib does it. Arguments that ``functools.partial`` binds (a data folder)
            are not part of what identifies a run.
        settings: JSON values by name.
        folder: Where finished runs are kept; on a cluster, a folder that all machines share.
        n_jobs: How many runs at a time; -1: as many as there are cores, in the machine or the cluster.
        backend: "loky": processes of this machine. "ray": the Ray cluster that ``RAY_ADDRESS`` names or ``ray.init`` has
            joined, else a local one.
        title: What the progress bar says.
        console: Where the progress bar, with the time left, is drawn.

    Returns:
        For each setting, in order, what its run returned: rows of the setting's entries and the result's.

    Raises:
        ValueError: If two settings are equal, or an argument is out of range.
        TypeError: If a setting holds anything but JSON values.
        SweepError: If runs failed, once all others are finished. They are run again the next time.

    Example:
        >>> import tempfile
        >>> def square(x):
        ...     return {"square": x * x}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sweep(square, grid(x=[2, 3]), folder, n_jobs=1, console=Console(quiet=True))
        [{'x': 2, 'square': 4}, {'x': 3, 'square': 9}]
    """
    joblib = _joblib()
    if backend not in ("loky", "ray"):
        raise ValueError(f"backend is {backend!r}; allowed is one of 'loky', 'ray'")
    if n_jobs != -1 and n_jobs < 1:
        raise ValueError(f"n_jobs is {n_jobs}; allowed is -1, or 1 or more")
    files = _files(function, [dict(setting) for setting in settings], Path(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    missing = [(file, setting) for file, setting in files.items() if not file.is_file()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=len(missing))

        class Parallel(joblib.Parallel):  # type: ignore[misc, name-defined]
            def print_progress(self) -> None:
                progress.update(task, completed=self.n_completed_tasks)

        if backend == "ray":
            _register_ray()
        with joblib.parallel_config(backend=backend):
            found = Parallel(n_jobs=n_jobs)(joblib.delayed(_run)(function, setting, file) for file, setting in missing)
    failures = [failure for failure in found if failure is not None]
    rows = [row for file in files if file.is_file() for row in _read(file)]
    if failures:
        raise SweepError(failures, rows, len(files))
    return rows


def save_rows(rows: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """Write rows as a table; return the file.

    Args:
        rows: Entries by column name; a column that a row lacks is empty in it.
        file: Its ending says how: ``.csv`` or ``.parquet``.

    Raises:
        ValueError: If the ending is another.
        ImportError: If pandas, or pyarrow for Parquet, is not installed.
    """
    import pandas as pd

    file = _table(file)
    table = pd.DataFrame(list(rows)).convert_dtypes()
    unfinished = file.with_name(file.name + ".part")
    if file.suffix == ".csv":
        table.to_csv(unfinished, index=False, lineterminator="\n")
    else:
        table.to_parquet(unfinished, index=False)
    os.replace(unfinished, file)
    return file


def load_rows(file: str | Path) -> list[Row]:
    """Read what `save_rows` wrote; a row has no entry where its column is empty.

    Raises:
        ValueError: If the file's ending is neither ``.csv`` nor ``.parquet``.
        ImportError: If pandas, or pyarrow for Parquet, is not installed.
    """
    import pandas as pd

    file = _table(file)
    table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    records = table.convert_dtypes().to_dict("records")
    return [{str(name): value for name, value in record.items() if not pd.isna(value)} for record in records]


def log_hparams(rows: Iterable[Row], hparams: Sequence[str], metrics: Sequence[str], folder: str | Path) -> None:
    """Write rows for TensorBoard's HParams page, a run each.

    Args:
        rows: What a sweep returned.
        hparams: The columns that are hyper-parameters.
        metrics: The columns that are results.
        folder: The log directory; runs in it are named by their hyper-parameters.

    Raises:
        ValueError: If two rows have the same hyper-parameters.
    """
    from torch.utils.tensorboard import SummaryWriter

    named: dict[str, Row] = {}
    for row in rows:
        name = ",".join(f"{key}={row[key]}" for key in hparams).replace("/", "_")
        if name in named:
            raise ValueError(
                f"two rows have the hyper-parameters {name}; average them first, or add what tells them apart"
            )
        named[name] = row
    for name, row in named.items():
        with SummaryWriter(str(folder)) as writer:
            writer.add_hparams(
                {key: row[key] for key in hparams}, {f"hparam/{key}": row[key] for key in metrics}, run_name=name
            )


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
    while isinstance(function, partial):
        function = function.func
    return f"{function.__module__}.{function.__qualname__}"


def _run(function: RunFunction, setting: dict[str, Any], file: Path) -> Failure | None:
    """Run one setting and save its rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = function(**setting)
        rows = [dict(row) for row in ([found] if isinstance(found, Mapping) else found)]
        for row in rows:
            if other := {name for name in set(row) & set(setting) if row[name] != setting[name]}:
                raise ValueError(f"the result has other values of {sorted(other)} than the setting")
        unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
        unfinished.write_text(json.dumps({"setting": setting, "rows": rows}) + "\n")
        os.replace(unfinished, file)
    except Exception as error:  # whatever the user's function raises is named when the sweep ends
        return Failure(setting, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        torch.set_num_threads(threads)
    return None


def _read(file: Path) -> list[Row]:
    content = json.loads(file.read_text())
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
