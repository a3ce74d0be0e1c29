"""The five UCI sets: all samples pooled, split 4:1, scaled to [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, train_test_split

from examples.data import Split, Splits, fetch

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/"
_ISOLET = "https://raw.githubusercontent.com/ma-xu/L21FS/b9d4e8eb7f6d7b5ccc62f9e638bdaef798b62e5e/data/"


class Published(NamedTuple):
    """A published file.

    Attributes:
        name: Its path below the data folder.
        url: Where it is downloaded from.
        checksum: As `examples.data.fetch` has it.
    """

    name: str
    url: str
    checksum: str


FILES = {
    "car": [
        Published(
            "uci/car.data", f"{_UCI}car/car.data", "b703a9ac69f11e64ce8c223c0a40de4d2e9d769f7fb20be5f8f2e8a619893d83"
        )
    ],
    "segmentation": [
        Published(
            "uci/segmentation.data",
            f"{_UCI}image/segmentation.data",
            "ed5b5aee8081bbe875357149f73f50d7085e22cc0897f5b52eb7b52fea969a5b",
        ),
        Published(
            "uci/segmentation.test",
            f"{_UCI}image/segmentation.test",
            "2e9e966479d54c6aaec309059376dd9c89c1b46bf3a23aceeefb36d20d93a189",
        ),
    ],
    "optdigits": [
        Published(
            "uci/optdigits.tra",
            f"{_UCI}optdigits/optdigits.tra",
            "e1b683cc211604fe8fd8c4417e6a69f31380e0c61d4af22e93cc21e9257ffedd",
        ),
        Published(
            "uci/optdigits.tes",
            f"{_UCI}optdigits/optdigits.tes",
            "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8",
        ),
    ],
    "mfeat": [
        Published(
            "uci/mfeat-fac",
            f"{_UCI}mfeat/mfeat-fac",
            "words:92250afd634d2624fd45efd7ce50203827f66d922074c8bfae0a28e31a5c9db6",
        )
    ],
    "isolet": [  # UCI publishes it in Unix compress only; these are the same samples as MATLAB files
        Published(f"uci/isolet/{name}", f"{_ISOLET}{name}", checksum)
        for name, checksum in {
            "Isolet1.mat": "f643c3cbd2669e1e9a6110943fcf538cfc209db384f3387d33acbbe550376765",
            "Isolet2.mat": "f69ca6b76d196a5778d1883ec7f18a2b97c620507675cd229c4e65fbb28c9037",
            "Isolet3.mat": "1d1f991f0a1b9e9decd73779ff595d7f66e4da47cac655f71fd350d2028106b7",
            "Isolet4.mat": "c676e6d11ef3b6ca17cd38c3cd9a44299fb5681a5ed8460adf821074d0af4fcd",
            "isolet5.mat": "a3849f6c0a9d0e0ed55dde15eb8ae8f4ba94df79b9fc260d00c28b8695d48600",
        }.items()
    ],
}
CAR = (  # the values of Car's six attributes
    ("vhigh", "high", "med", "low"),
    ("vhigh", "high", "med", "low"),
    ("2", "3", "4", "5more"),
    ("2", "4", "more"),
    ("small", "med", "big"),
    ("low", "med", "high"),
)
Table = tuple[NDArray[np.float64], NDArray[Any]]  # (n, features), (n,)


def _car(paths: list[Path]) -> Table:
    rows = [line.split(",") for line in paths[0].read_text().split()]
    x = [[float(row[i] == value) for i, values in enumerate(CAR) for value in values] for row in rows]
    return np.array(x), np.array([row[6] for row in rows])


def _segmentation(paths: list[Path]) -> Table:
    lines = [line.split(",") for path in paths for line in path.read_text().splitlines()[5:]]
    return np.array([line[1:] for line in lines], dtype=float), np.array([line[0] for line in lines])


def _optdigits(paths: list[Path]) -> Table:
    rows = np.vstack([np.loadtxt(path, delimiter=",") for path in paths])
    return rows[:, :-1], rows[:, -1]


def _mfeat(paths: list[Path]) -> Table:
    return np.loadtxt(paths[0]), np.repeat(np.arange(10), 200)  # the file holds no labels, but the digits in order


def _isolet(paths: list[Path]) -> Table:
    from scipy.io import loadmat

    parts = [loadmat(path) for path in paths]
    return np.vstack([part["fea"] for part in parts]), np.concatenate([part["gnd"].ravel() for part in parts])


_READERS: dict[str, Callable[[list[Path]], Table]] = {
    "car": _car,
    "segmentation": _segmentation,
    "optdigits": _optdigits,
    "mfeat": _mfeat,
    "isolet": _isolet,
}


def uci(name: str, folder: Path | None = None) -> Split:
    """Return all samples of a set, unscaled; classes are 0 to C - 1 in the order of the file's labels.

    Args:
        name: A key of `FILES`.
        folder: As in `examples.data.fetch`; the files are below it in ``uci``.

    Raises:
        ValueError: If there is no such set.
    """
    if name not in FILES:
        raise ValueError(f"{name!r} is not a UCI set here; they are {', '.join(FILES)}")
    x, labels = _READERS[name]([fetch(file.name, file.url, folder, file.checksum) for file in FILES[name]])
    y = np.unique(labels, return_inverse=True)[1]
    return Split(torch.from_numpy(x).float(), torch.from_numpy(y).long())


def scaled(train: Split, *others: Split) -> list[Split]:
    """Scale every feature to [-1, 1] by its range over the training part; a feature that is constant there becomes -1.

    Args:
        train: ``(n, features)``.
        others: Scaled by the same ranges, so that their values may lie outside.

    Returns:
        All of them, the training part first.
    """
    low, high = train.x.aminmax(dim=0)
    width = torch.where(high > low, high - low, 1.0)
    return [Split((part.x - low) / width * 2 - 1, part.y) for part in (train, *others)]


def splits(pooled: Split, seed: int, validation: float = 0.0) -> Splits:
    """Draw a test part of a fifth, and a validation part of what is left, and scale them by what remains.

    Args:
        pooled: All samples.
        seed: Of the draws.
        validation: The fraction of the other four fifths; 0: nothing is held out, and the part is empty.
    """
    return Splits(*scaled(*unscaled_splits(pooled, seed, validation)))


def unscaled_splits(pooled: Split, seed: int, validation: float = 0.0) -> Splits:
    """Draw a test part of a fifth, and a validation part of what is left; both stratified and drawn by the seed.

    Args:
        pooled: As in `splits`.
        seed: As in `splits`.
        validation: As in `splits`.
    """
    rows, test = train_test_split(np.arange(len(pooled.y)), test_size=0.2, stratify=pooled.y, random_state=seed)
    held = rows[:0]
    if validation:
        rows, held = train_test_split(rows, test_size=validation, stratify=pooled.y[rows], random_state=seed)
    return Splits(*(Split(pooled.x[part], pooled.y[part]) for part in (rows, held, test)))


def folds(pooled: Split, seed: int, run: int = 0, n: int = 5) -> list[Splits]:
    """Cut the training part of a split into folds: each is the validation part once, and there is no test part.

    Args:
        pooled: All samples.
        seed: Of the split; its fifth for the test is left out.
        run: Which of several draws of the folds.
        n: How many folds.
    """
    rows, _ = train_test_split(np.arange(len(pooled.y)), test_size=0.2, stratify=pooled.y, random_state=seed)
    found = []
    for train, held in StratifiedKFold(n, shuffle=True, random_state=run).split(rows, pooled.y[rows]):
        parts = (Split(pooled.x[part], pooled.y[part]) for part in (rows[train], rows[held], rows[:0]))
        found.append(Splits(*scaled(*parts)))
    return found
