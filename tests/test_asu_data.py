"""The ASU sets: what is published of them, and what is refused."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pooch", reason="the extra 'examples' is not installed")
pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")

from examples import data
from examples.data import ASU, DATA_VARIABLE, AsuFile, Split, asu, fetch, git_blob, standardized, word_counts

HELLO = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object of "hello\n"

# rows, features, rows for the test, class sizes, least and greatest value
PUBLISHED: dict[str, tuple[int, int, int, list[int], float, float]] = {
    "Leukemia": (72, 7070, 24, [47, 25], -2, 2),
    "PCMAC": (1943, 3289, 648, [982, 961], 0, 149),
    "Lung-discrete": (73, 325, 25, [6, 5, 5, 16, 7, 13, 21], -2, 2),
    "orlraws10P": (100, 10304, 34, [10] * 10, 0, 245),
    "TOX-171": (171, 5748, 57, [45, 45, 39, 42], 0.02, 33922.68),
    "Prostate-GE": (102, 5966, 34, [50, 52], 1.0, 4.2041),
    "arcene": (200, 10000, 67, [112, 88], 0, 999),
    "madelon": (2600, 500, 867, [1300, 1300], 0, 999),
    "Yale": (165, 1024, 55, [11] * 15, 0, 255),
    "GLIOMA": (50, 4434, 17, [14, 7, 14, 15], 1.301, 4.082),
    "RELATHE": (1427, 4322, 476, [779, 648], 0, 199),
}


def folder_with(name: str) -> Path:
    folder = Path(os.environ.get(DATA_VARIABLE) or "absent")
    if not (folder / "asu" / ASU[name].file).is_file():
        pytest.skip(f"{name} is not there: {DATA_VARIABLE} names no folder with asu/{ASU[name].file}")
    return folder


def labelled_rows(x: Any, y: Any) -> Counter[tuple[bytes, int]]:
    return Counter((row.tobytes(), int(label)) for row, label in zip(np.asarray(x), np.asarray(y), strict=True))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which lung is a file of seven rows, stored in small integers."""
    from scipy.io import savemat

    path = tmp_path / "asu" / "lung.mat"
    path.parent.mkdir()
    x = np.arange(7, dtype=np.uint8)[:, None] * np.array([1, 36], dtype=np.uint8)
    savemat(path, {"X": x, "Y": np.array([[3, 1, 3, 7, 1, 1, 7]], dtype=np.uint8).T})
    monkeypatch.setitem(data.ASU, "lung", AsuFile("lung.mat", git_blob(path.read_bytes())))
    return tmp_path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a site whose gisette.mat is "hello"; the cache is an empty folder."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "gisette.mat").write_bytes(b"hello\n")
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.os_cache", lambda _: tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/gisette.mat"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_are_the_published_ones(name: str) -> None:
    n, features, n_test, classes, least, greatest = PUBLISHED[name]
    train, test = asu(name, 0, folder_with(name))
    assert train.x.shape == (n - n_test, features)
    assert test.x.shape == (n_test, features)
    x, y = torch.cat([train.x, test.x]), torch.cat([train.y, test.y])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert y.bincount().tolist() == classes
    assert float(x.min()) == pytest.approx(least, abs=0.005)
    assert float(x.max()) == pytest.approx(greatest, abs=0.005)


@pytest.mark.parametrize(
    ("name", "percent"),
    [("Leukemia", 87.5), ("Lung-discrete", 88.0), ("orlraws10P", 79.4), ("TOX-171", 82.5), ("Prostate-GE", 88.2),
     ("arcene", 79.1), ("Yale", 74.5), ("GLIOMA", 64.7)],
)  # fmt: skip
def test_published_accuracies_are_fractions_of_the_test_rows(name: str, percent: float) -> None:
    n_test = PUBLISHED[name][2]
    assert percent in {round(100 * right / n_test, 1) for right in range(n_test)}


@pytest.mark.parametrize("name", ["Lung-discrete", "Yale"])
def test_train_and_test_are_the_rows_of_the_file_once_each(name: str) -> None:
    from scipy.io import loadmat

    folder = folder_with(name)
    content = loadmat(folder / "asu" / ASU[name].file)
    train, test = asu(name, 5, folder)
    both = labelled_rows(train.x, train.y) + labelled_rows(test.x, test.y)
    assert both == labelled_rows(content["X"].astype(np.float32), content["Y"].ravel().astype(int) - 1)


def test_small_integers_and_any_labels_are_read(published: Path) -> None:
    train, test = asu("lung", 0, published)
    assert (len(train.y), len(test.y)) == (4, 3)
    x, y = torch.cat([train.x, test.x]), torch.cat([train.y, test.y])
    order = x[:, 0].argsort()
    assert x[order].tolist() == [[i, 36.0 * i] for i in range(7)]
    assert y[order].tolist() == [1, 0, 1, 2, 0, 0, 2]


def test_split_is_the_seeds_alone(published: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = asu("lung", 0, published)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = asu("lung", 0, published)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(first, again, strict=True))
    tests = {tuple(asu("lung", seed, published)[1].x[:, 0].tolist()) for seed in range(5)}
    assert len(tests) > 1


def test_the_table_names_the_fifteen_sets_and_their_files() -> None:
    assert len(ASU) == 15
    assert len({file for file, _ in ASU.values()}) == 15
    blobs = [name for name, (_, checksum) in ASU.items() if len(checksum) == 40]
    assert blobs == ["gisette", "lung", "CLL-SUB-111", "Carcinom"]
    assert all(len(checksum) == 64 for name, (_, checksum) in ASU.items() if name not in blobs)


def test_standardized_is_the_closed_form() -> None:
    train = Split(torch.tensor([[1.0, 0.1], [3.0, 0.1], [5.0, 0.1]]), torch.tensor([0, 1, 0]))
    test = Split(torch.tensor([[7.0, 2.1]]), torch.tensor([1]))
    unit = 1.5**0.5  # (5 - 3) / sqrt(8 / 3)
    scaled_train, scaled_test = standardized(train, test)
    torch.testing.assert_close(scaled_train.x, torch.tensor([[-unit, 0.0], [0.0, 0.0], [unit, 0.0]]))
    torch.testing.assert_close(scaled_test.x, torch.tensor([[2 * unit, 2.0]]))
    assert scaled_train.y is train.y
    assert scaled_test.y is test.y


def test_standardized_is_scikit_learns() -> None:
    from sklearn.preprocessing import StandardScaler

    x = torch.rand(40, 9) * 10 ** torch.arange(-3.0, 6.0)
    x[:, 4] = 0.1
    train, test = Split(x[:30], torch.zeros(30)), Split(x[30:], torch.zeros(10))
    scaler = StandardScaler().fit(train.x.double().numpy())
    for before, after in zip((train, test), standardized(train, test), strict=True):
        expected = torch.from_numpy(scaler.transform(before.x.double().numpy())).float()
        torch.testing.assert_close(after.x, expected)
    assert not standardized(train, test)[0].x[:, 4].any()


def test_word_counts_is_the_closed_form() -> None:
    e = float(np.e)
    train = Split(torch.tensor([[e**3 - 1, 0.0, 0.0, e**4 - 1], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    test = Split(torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([1]))
    scaled_train, scaled_test = word_counts(train, test)
    torch.testing.assert_close(scaled_train.x, torch.tensor([[1.2, 0.0, 0.0, 1.6], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(scaled_test.x, torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
    assert scaled_train.y is train.y
    assert scaled_test.y is test.y


def test_git_blob_is_gits() -> None:
    assert git_blob(b"hello\n") == HELLO
    assert git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize(("name", "kind"), [("GLIOMA", "SHA-256"), ("gisette", "git blob")])
def test_a_corrupted_file_is_refused_but_kept(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "asu" / ASU[name].file
    path.parent.mkdir()
    path.write_bytes(b"hello\n")
    with pytest.raises(ValueError, match=rf"{ASU[name].file} .*expected {kind} {ASU[name].checksum}, found \w+$"):
        asu(name, 0, tmp_path)
    assert path.is_file()


def test_a_bad_download_is_refused_and_not_cached(site: str, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"gisette.mat .*{ASU['gisette'].checksum}, found {HELLO}"):
            fetch("asu/gisette.mat", site, None, ASU["gisette"].checksum)
        assert not list((tmp_path / "cache" / "asu").iterdir())


def test_a_good_download_is_cached_and_checked_again(site: str, tmp_path: Path) -> None:
    path = fetch("asu/gisette.mat", site, None, HELLO)
    assert path == tmp_path / "cache" / "asu" / "gisette.mat"
    (tmp_path / "site" / "gisette.mat").unlink()
    assert fetch("asu/gisette.mat", site, None, HELLO).read_bytes() == b"hello\n"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="found"):
        fetch("asu/gisette.mat", site, None, HELLO)
    assert not path.exists()


@pytest.mark.parametrize("name", ASU)
def test_an_absent_file_is_named_with_its_address(name: str, tmp_path: Path) -> None:
    file = ASU[name].file
    address = f"https://jundongl.github.io/scikit-feature/files/datasets/{file}"
    with pytest.raises(FileNotFoundError, match=rf"asu/{file}.*--data, LIGHTNING_CPNA_DATA.*{address}"):
        asu(name, 0, tmp_path)


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'Lung' is not.*Leukemia, PCMAC, Lung-discrete.*RELATHE"):
        asu("Lung", 0)
