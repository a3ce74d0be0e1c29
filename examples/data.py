"""The public data sets of the examples: from a local folder, else downloaded once and checked."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DATA_VARIABLE = "LIGHTNING_CPNA_DATA"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_SCIKIT_FEATURE = "https://jundongl.github.io/scikit-feature/files/datasets/"


class AsuFile(NamedTuple):
    """A file of the ASU feature selection repository.

    Attributes:
        file: Its name there.
        checksum: Its SHA-256, 64 digits, or the 40 digits of its git blob where no SHA-256 is published.
    """

    file: str
    checksum: str


ASU = {
    "Leukemia": AsuFile("leukemia.mat", "eb92382fb77c968864cb0a92a2c77acde7f88ba7fe5fd5a64b98184e3a05269d"),
    "PCMAC": AsuFile("PCMAC.mat", "9999dfccf97ab88f87127dd3457da436acb75cda9f0af4750e7cae5fe1a31b25"),
    "Lung-discrete": AsuFile("lung_discrete.mat", "93c6a65eb1f6f9f95ac897010c337254a57c57e7f8c0c9a7963a0e03de8233f4"),
    "gisette": AsuFile("gisette.mat", "09251d363e834a5cec17634245f09ae33f8c2f3b"),
    "lung": AsuFile("lung.mat", "becb82c675f788b040d5ced741955e19b94ce9b8"),
    "CLL-SUB-111": AsuFile("CLL_SUB_111.mat", "6f14fa8d02fbe7fca3e73f4c97da3f1e7003a648"),
    "Carcinom": AsuFile("Carcinom.mat", "ed23efd165241be723f0796d8660c67ca8448bcc"),
    "orlraws10P": AsuFile("orlraws10P.mat", "6ffa58759c5636f4ce311d23e44ef8de9f39bbb844902154c0cc5daac71226d6"),
    "TOX-171": AsuFile("TOX_171.mat", "f52f57e61775b7830c84750456d7fadfd220d1cc8eed26419c3390eb9216cc84"),
    "Prostate-GE": AsuFile("Prostate_GE.mat", "050b598534dbc662f23e30f39b41354b61d02ab8567837bcf9b1091c1c636ab4"),
    "arcene": AsuFile("arcene.mat", "779d678207b9a8c0ba8f2f5ecdb2216d9f98bf475ab040e806797efd36331bc5"),
    "madelon": AsuFile("madelon.mat", "7dc9c9ff8d902651948e2df7f9cb6ed38c5d91e4c4159914cecb1ddbc7def12c"),
    "Yale": AsuFile("Yale.mat", "cccd29abd2c520dd5cc8ff7645b422c2bdadd59406a6b6a0239143d9d44afcf3"),
    "GLIOMA": AsuFile("GLIOMA.mat", "c31cd32edd770c7a102729839e670e588bc959a591e0eae5a0676c9ca11d4c4f"),
    "RELATHE": AsuFile("RELATHE.mat", "1091fe26c721aa69ddc5ce3ebcef54e03565809cae07e1769cef45ad23ab28d0"),
}
_MNIST_CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
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


def git_blob(content: bytes) -> str:
    """Return the hash that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _named(folder: Path | None) -> Path | None:
    return folder or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)


def fetch(name: str, url: str, folder: Path | None, checksum: str) -> Path:
    """Find a file in a local folder, else download it once into the cache; either way, check it.

    Args:
        name: Its path below the folder.
        url: Where it is downloaded from.
        folder: The folder; None is the one that ``LIGHTNING_CPNA_DATA`` names, if it does.
        checksum: The file's SHA-256, 64 digits, or the 40 digits of its git blob; after "words:", the SHA-256 of its words
            with one space between them, for a file that is published with other white space too.

    Raises:
        FileNotFoundError: If a folder is named and does not have it.
        OSError: If it cannot be downloaded.
        ValueError: If its checksum is not the published file's; a download is then deleted from the cache.
    """
    named = _named(folder)
    if named is None:
        cache = pooch.create(pooch.os_cache("lightning_cpna"), "", registry={name: None}, urls={name: url})
        try:
            path = Path(cache.fetch(name))
        except OSError as error:
            error.add_note(f"to do without this download, put {url} at {name} in a folder, and name that by --data")
            raise
    else:
        path = named / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the data folder (--data, {DATA_VARIABLE}) does not have this file; it is published at {url}"
            )
    content, expected = path.read_bytes(), checksum.removeprefix("words:")
    if expected != checksum:
        content = b" ".join(content.split())
    kind = "SHA-256" if len(expected) == 64 else "git blob"
    found = hashlib.sha256(content).hexdigest() if kind == "SHA-256" else git_blob(content)
    if found != expected:
        if named is None:
            path.unlink(missing_ok=True)
        raise ValueError(f"{path} is not the file published at {url}: expected {kind} {expected}, found {found}")
    return path


def mnist(seed: int, folder: Path | None = None) -> Splits:
    """Return MNIST: 50,000 training and 10,000 validation examples, drawn by the seed, and the 10,000 for the test.

    Pixels are scaled to mean 0 and standard deviation 1 over the training set of 60,000.
    """

    def read(part: str, kind: str, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        name = f"{part}-{kind}-ubyte.gz"
        file = fetch(f"mnist/{name}", _MNIST + name, folder, _MNIST_CHECKSUMS[name])
        content = gzip.decompress(file.read_bytes())
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


def is_here(name: str, folder: Path | None = None) -> bool:
    """Tell whether an ASU set can be had: it is in the local folder, or no folder is named, so that it is downloaded."""
    named = _named(folder)
    return named is None or (named / "asu" / ASU[name].file).is_file()


def asu(name: str, seed: int, folder: Path | None = None) -> tuple[Split, Split]:
    """Return a set of the ASU repository: two thirds for the training and one third for the test, drawn by the seed.

    The draw is not stratified; the test's third is rounded up.

    Args:
        name: A key of `ASU`.
        seed: Of the draw.
        folder: As in `fetch`; the files are below it in ``asu``.

    Returns:
        Train ``(2 n // 3, features)`` and test ``(ceil(n / 3), features)``: the file's values, unscaled; classes
        are 0 to C - 1 in the order of the file's labels.

    Raises:
        ValueError: If there is no such set.
    """
    from scipy.io import loadmat

    if name not in ASU:
        raise ValueError(f"{name!r} is not an ASU set; they are {', '.join(ASU)}")
    file, checksum = ASU[name]
    content = loadmat(fetch(f"asu/{file}", _SCIKIT_FEATURE + file, folder, checksum))
    x = torch.from_numpy(content["X"].astype(np.float32, order="C"))
    y = torch.from_numpy(np.unique(content["Y"].ravel(), return_inverse=True)[1].astype(np.int64))
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = rows[: 2 * len(y) // 3], rows[2 * len(y) // 3 :]
    return Split(x[train], y[train]), Split(x[test], y[test])


def standardized(train: Split, test: Split) -> tuple[Split, Split]:
    """Scale every feature to mean 0 and standard deviation 1 over the training part; a constant one is only centered.

    Args:
        train: ``(n, features)``.
        test: ``(m, features)``.

    Returns:
        The two in the same shapes.
    """
    std, mean = torch.std_mean(train.x.double(), dim=0, correction=0)  # in double, a constant column's std is exactly 0
    std[std == 0] = 1

    def scaled(split: Split) -> Split:
        return Split(((split.x - mean) / std).float(), split.y)

    return scaled(train), scaled(test)


def word_counts(train: Split, test: Split) -> tuple[Split, Split]:
    """Scale counts: ``log(1 + count)``, every row to the length ``sqrt(features)``; a row of zeros stays one.

    Args:
        train: ``(n, features)``.
        test: ``(m, features)``.

    Returns:
        The two in the same shapes.
    """

    def scaled(split: Split) -> Split:
        return Split(F.normalize(split.x.log1p(), dim=1) * split.x.shape[1] ** 0.5, split.y)

    return scaled(train), scaled(test)


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
