"""The public data sets of the examples: from a local folder, else downloaded once and checked."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DATA_VARIABLE = "LIGHTNING_CPNA_DATA"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_SHA256 = {
    "mnist/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "mnist/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "mnist/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "mnist/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class Split(NamedTuple):
    """Examples and their classes.

    Attributes:
        x: Float32, ``(n, features)``.
        y: Int64, ``(n,)``.
    """

    x: Tensor
    y: Tensor


class Splits(NamedTuple):
    """What is trained on, what choices are made on, and what is reported."""

    train: Split
    validation: Split
    test: Split


def fetch(name: str, url: str, folder: Path | None) -> Path:
    """Find a file in a local folder, else download it once into the cache and check it.

    Args:
        name: Its path below the folder.
        url: Where it is downloaded from.
        folder: The folder; None is the one that ``LIGHTNING_CPNA_DATA`` names, if it does.

    Raises:
        FileNotFoundError: If a folder is named and does not have it.
    """
    named = folder or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if named is None:
        cache = Path(pooch.os_cache("lightning_cpna")) / name
        return Path(pooch.retrieve(url, f"sha256:{_SHA256[name]}", fname=cache.name, path=cache.parent))
    if not (named / name).is_file():
        raise FileNotFoundError(f"{named / name}: the data folder (--data, {DATA_VARIABLE}) does not have this file")
    return named / name


def mnist(seed: int, folder: Path | None = None) -> Splits:
    """Return MNIST: 50,000 training and 10,000 validation examples, drawn by the seed, and the 10,000 for the test.

    Pixels are scaled to mean 0 and standard deviation 1 over the training set of 60,000.
    """

    def read(part: str, kind: str, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        name = f"{part}-{kind}-ubyte.gz"
        content = gzip.decompress(fetch(f"mnist/{name}", _MNIST + name, folder).read_bytes())
        return np.frombuffer(content, dtype=np.uint8, offset=offset)

    def split(part: str) -> Split:
        x = torch.from_numpy(read(part, "images-idx3", 16).reshape(-1, 784).astype(np.float32))
        return Split((x - 33.3184) / 78.5675, torch.from_numpy(read(part, "labels-idx1", 8).astype(np.int64)))

    whole, test = split("train"), split("t10k")
    rows = torch.randperm(len(whole.y), generator=torch.Generator().manual_seed(seed))
    train, validation = rows[:50_000], rows[50_000:]
    return Splits(Split(whole.x[train], whole.y[train]), Split(whole.x[validation], whole.y[validation]), test)


def digits(seed: int) -> Splits:
    """Return scikit-learn's 8 x 8 digits: 1,797 examples, stratified 55 : 15 : 30 by the seed, pixels in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.15 / 0.7, stratify=y[rest], random_state=seed)

    def split(rows: Any) -> Split:
        return Split(torch.from_numpy(x[rows] / 16).float(), torch.from_numpy(y[rows]))

    return Splits(split(train), split(validation), split(test))


class Batches(Dataset[Any]):
    """Whole batches of a split as items, so that no example is collated in Python."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return a batch, ``(rows, features)`` and ``(rows,)``."""
        return self.split.x[rows], self.split.y[rows]


class _Shuffled:
    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size = n, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        rows = torch.randperm(self.n, generator=self.generator)
        yield from torch.split(rows[: len(self) * self.batch_size], self.batch_size)


def loader(split: Split, batch_size: int | None = None, seed: int = 0) -> DataLoader[Any]:
    """Return a loader: shuffled batches of one size, or everything as one batch."""
    sampler: Any = [slice(None)] if batch_size is None else _Shuffled(len(split.y), batch_size, seed)
    return DataLoader(Batches(split), sampler=sampler, batch_size=None)
