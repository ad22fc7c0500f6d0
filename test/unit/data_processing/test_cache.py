"""The cache: entries are found only if all they depend on is the same, are whole, and stay within the limit."""

import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import write_rows

from data_processing import features
from data_processing.cache import Cache, default_folder, digest, write_values
from data_processing.features import load_features
from data_processing.files import file_digest, lock
from data_processing.tasks import find_task
from transformer.tokenization import BertTokenizer

SST2 = find_task("SST-2")
ROWS = [["sentence", "label"], ["A film", "1"], ["a bad film", "0"]]
LARGE = 10**9
FLOATS = {"x": ((6,), np.dtype(np.float32))}


def tokenizer(folder: Path, *words: str, lower: bool = True) -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", *words]
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return BertTokenizer.from_pretrained(folder, lower)


@pytest.fixture
def tokenized(monkeypatch) -> list[Path]:
    """The files that were read and tokenized."""
    seen: list[Path] = []
    read = features.read_examples
    monkeypatch.setattr(features, "read_examples", lambda path, task: seen.append(path) or read(path, task))
    return seen


def key(number: int) -> str:
    return f"{number:032x}"


def entries(folder: Path) -> list[str]:
    """The names in the folder of features, those of entries by their numbers."""
    names = sorted(path.name for path in (folder / "features").iterdir())
    return [f"key{int(name, 16)}" if len(name) == 32 else name for name in names]


def fill(cache: Cache) -> None:
    """Puts entries of 928 bytes each, 0 to 2, of which 0 was used first."""
    for number in range(3):
        cache.put("features", key(number), {"x": np.zeros(100)})
        os.utime(cache.folder / "features" / key(number), (number, number))


def pending(folder: Path, kind: str = "features", machine: str = platform.node()) -> Path:
    """A pending entry that a process of a machine left behind."""
    path = folder / kind / f"making-{machine}-abc"
    path.mkdir(parents=True)
    (path / "x.npy").write_bytes(b"0" * 1000)
    return path


def test_a_second_run_finds_the_same_features(tmp_path, tokenized):
    path, words, cache = write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path), Cache(tmp_path / "c", LARGE)
    first, second = (load_features(path, SST2, words, 16, cache) for _ in range(2))
    assert tokenized == [path]
    for name in ("tokens", "offsets", "first_lengths", "labels"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
        assert getattr(first, name).dtype == getattr(second, name).dtype
    assert not second.tokens.flags.writeable  # one copy for all processes


def test_features_are_made_again_if_anything_they_depend_on_changes(tmp_path, tokenized):
    cache, path, words = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    load_features(path, SST2, words, 16, cache)
    changes = [
        (path, SST2, words, 8),
        (path, SST2, tokenizer(tmp_path, "bad"), 16),
        (path, SST2, tokenizer(tmp_path, lower=False), 16),
        (path, replace(SST2, labels=("1", "0")), words, 16),
        (path, replace(SST2, text_columns=(1,)), words, 16),
        (write_rows(tmp_path / "train.tsv", [*ROWS, ["a film", "1"]]), SST2, words, 16),
    ]
    for number, change in enumerate(changes, start=2):
        load_features(*change, cache)
        assert len(tokenized) == number
    os.rename(tmp_path / "train.tsv", tmp_path / "other.tsv")  # the name does not matter
    load_features(tmp_path / "other.tsv", SST2, words, 16, cache)
    assert len(tokenized) == len(changes) + 1


def test_a_broken_entry_is_replaced(tmp_path, tokenized):
    cache, path, words = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    expected = load_features(path, SST2, words, 16, cache)
    (entry,) = (tmp_path / "c/features").iterdir()
    for break_it in (
        lambda: (entry / "tokens.npy").write_bytes((entry / "tokens.npy").read_bytes()[:-1]),
        lambda: (entry / "labels.npy").unlink(),
        lambda: (entry / "offsets.npy").write_bytes(b""),
    ):
        break_it()
        for _ in range(2):
            assert load_features(path, SST2, words, 16, cache).tokens.tolist() == expected.tokens.tolist()
    assert len(tokenized) == 4


def rewrite(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda ids: ids + 20_000),
        ("tokens", lambda ids: ids[:-1]),
        ("tokens", lambda ids: ids.view(np.int16)),
        ("offsets", lambda offsets: offsets + 1),
        ("first_lengths", lambda lengths: lengths[::-1] - 9),
        ("labels", lambda labels: labels.astype(np.float64) * np.nan),
        ("labels", lambda labels: labels.reshape(1, -1)),
        ("checksums", lambda checksums: checksums[:-1]),
    ],
)
def test_an_entry_with_other_values_is_named_and_made_again(tmp_path, tokenized, caplog, name, change):
    cache, path, words = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    expected = load_features(path, SST2, words, 16, cache)
    (entry,) = (tmp_path / "c/features").iterdir()
    rewrite(entry / f"{name}.npy", change)
    for _ in range(2):
        found = load_features(path, SST2, words, 16, cache)
        assert all(np.array_equal(getattr(found, field), values) for field, values in vars(expected).items())
    assert len(tokenized) == 2
    assert caplog.text.count(str(entry)) == 1


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\x93NUMPY\x01\x00\x04\x00((((", b"\x80\x04cposix\nsystem\n"])
def test_an_entry_that_is_no_array_is_made_again(tmp_path, tokenized, content):
    cache, path, words = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    load_features(path, SST2, words, 16, cache)
    (entry,) = (tmp_path / "c/features").iterdir()
    (entry / "tokens.npy").write_bytes(content)
    load_features(path, SST2, words, 16, cache)
    (entry / "tokens.npy").unlink()
    os.mkfifo(entry / "tokens.npy")
    load_features(path, SST2, words, 16, cache)
    assert len(tokenized) == 3


def test_a_run_works_without_a_cache_folder(tmp_path, caplog):
    path, words = write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert len(load_features(path, SST2, words, 16, Cache(None, LARGE))) == 2
    assert caplog.records == []
    assert len(load_features(path, SST2, words, 16, Cache(tmp_path / "file", LARGE))) == 2
    assert "cannot be cached" in caplog.text
    assert (tmp_path / "file").read_text() == "no folder"


def test_the_least_recently_used_entries_are_removed_at_the_limit(tmp_path):
    cache = Cache(tmp_path, 3500)
    fill(cache)
    assert cache.get("features", key(0), ["x"]) is not None  # used just now
    cache.put("features", key(3), {"x": np.zeros(100)})
    assert entries(tmp_path) == ["key0", "key2", "key3"]
    cache.put("features", key(9), {"x": np.zeros(1000)})  # more than the limit allows
    assert entries(tmp_path) == ["key0", "key2", "key3"]


def test_entries_are_removed_to_make_room_on_the_disk(tmp_path, monkeypatch):
    cache = Cache(tmp_path, LARGE)
    fill(cache)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Disk", (), {"free": 1000}))
    with pytest.raises(OSError, match="No space left on device"):  # which removing all would not change
        cache.make("features", key(8), {"x": ((1000,), np.dtype(np.float64))})
    assert entries(tmp_path) == ["key0", "key1", "key2"]
    cache.make("features", key(9), {"x": ((200,), np.dtype(np.float64))}).keep()
    assert entries(tmp_path) == ["key1", "key2", "key9"]


def test_a_full_disk_leaves_nothing_and_logs_a_warning(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        Cache(tmp_path, LARGE).put("features", key(7), {"small": np.zeros(3), "x": np.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == []
    assert "File too large" in caplog.text


def test_different_values_have_different_digests(tmp_path):
    array = np.arange(6)
    assert digest(a=1, b=b"x", c=array) == digest(c=np.arange(12)[::2] // 2, b=b"x", a=1)
    assert len({digest(a=1), digest(a="1"), digest(b=1), digest(a=b"1"), digest(a=[1]), digest(a=array)}) == 6
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_default_folder_is_in_the_users_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/tinybert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/tinybert")


def test_files_of_the_user_in_the_cache_folder_are_never_removed(tmp_path):
    own = [
        tmp_path / "photos/2020/a.jpg",
        tmp_path / "features/mine/a.npy",
        tmp_path / f"features/{key(1)}/notes.txt",
        tmp_path / f"features/{key(2)}/sub/a.npy",
        tmp_path / f"photos/{key(3)}/a.npy",
        tmp_path / "features/making-of/film.mp4",
        tmp_path / f"features/{key(4)}.npy",
    ]
    for file in own:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 5000)
        os.utime(file.parent, (0, 0))
    cache = Cache(tmp_path, 1100)
    for number in (5, 6):
        cache.put("features", key(number), {"x": np.zeros(100)})
    assert all(file.is_file() for file in own)
    assert cache.get("features", key(5), ["x"]) is None
    assert cache.get("features", key(6), ["x"]) is not None


def test_an_entry_has_the_permissions_of_its_folder(tmp_path):
    (tmp_path / "features").mkdir(mode=0o755)
    Cache(tmp_path, LARGE).put("features", key(1), {"x": np.zeros(3)})
    assert (tmp_path / "features" / key(1)).stat().st_mode & 0o777 == 0o755


def test_a_pending_entry_is_found_once_it_is_kept(tmp_path):
    cache = Cache(tmp_path, LARGE)
    entry = cache.make("features", key(1), FLOATS | {"y": ((2,), np.dtype(np.uint16))})
    assert entries(tmp_path)[0].startswith("making-")
    write_values(entry.folder / "x.npy", 4, np.array([4, 5], dtype=np.float32))
    write_values(entry.folder / "x.npy", 1, np.array([[1], [2]], dtype=np.float32))
    assert cache.open("features", key(1), ["x"]) is None
    entry.keep()
    entry.discard()  # does nothing to an entry that was kept
    found = cache.open("features", key(1), ["x", "y"])
    assert (found["x"].tolist(), found["x"].dtype) == ([0, 1, 2, 0, 4, 5], np.float32)
    assert (found["y"].tolist(), found["y"].dtype) == ([0, 0], np.uint16)
    assert entries(tmp_path) == ["key1"]


def test_a_discarded_entry_leaves_nothing(tmp_path):
    entry = Cache(tmp_path, LARGE).make("features", key(1), FLOATS)
    entry.discard()
    assert entries(tmp_path) == []
    with pytest.raises(OSError, match=r"x\.npy"):
        write_values(entry.folder / "x.npy", 0, np.zeros(1))


@pytest.mark.parametrize("kind", ["features", "teacher_states"])
def test_the_pending_entry_of_a_stopped_process_is_removed(tmp_path, kind):
    """Of a process of this machine; locks of another machine may not be visible here."""
    stopped, elsewhere = pending(tmp_path, kind), pending(tmp_path, kind, "another-machine")
    cache = Cache(tmp_path, LARGE)
    running = cache.make("features", key(1), FLOATS)
    cache.make("features", key(1), FLOATS).keep()
    assert not stopped.exists()
    assert elsewhere.exists()
    running.keep()
    assert cache.open("features", key(1), ["x"]) is not None


def test_a_pending_entry_is_removed_a_day_after_its_last_change(tmp_path):
    cache, elsewhere = Cache(tmp_path, LARGE), pending(tmp_path, machine="another-machine")
    os.utime(elsewhere, (time.time() - 48 * 3600,) * 2)
    running = cache.make("features", key(1), FLOATS)
    assert not elsewhere.exists()
    os.utime(running.folder, (0, 0))
    write_values(running.folder / "x.npy", 0, np.ones(1, dtype=np.float32))
    cache.put("features", key(2), {"x": np.zeros(3)})
    running.keep()
    assert cache.open("features", key(1), ["x"])["x"].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    os.close(first)
    os.close(lock(tmp_path))


def test_concurrent_runs_stay_within_the_limit_together(tmp_path):
    cache, arrays = Cache(tmp_path, 2000), {"x": ((150,), np.dtype(np.float64))}
    first = cache.make("features", key(1), arrays)
    with pytest.raises(OSError, match="--cache_limit"):
        cache.make("features", key(2), arrays)
    first.discard()
    cache.make("features", key(2), arrays).keep()


def test_concurrent_runs_that_keep_the_same_entry_leave_one(tmp_path, monkeypatch):
    """The other run finishes between the removal of the old entry and the rename of ours."""
    cache = Cache(tmp_path, LARGE)
    ours, theirs = (cache.make("features", key(1), FLOATS) for _ in range(2))
    rename = Path.rename

    def late(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        theirs.keep()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", late)
    ours.keep()
    assert entries(tmp_path) == ["key1"]
    assert cache.open("features", key(1), ["x"])["x"].shape == (6,)
