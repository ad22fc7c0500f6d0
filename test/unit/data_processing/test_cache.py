"""What is kept between runs: found again only where all it depends on is the same, bounded, and never in the way."""

import fcntl
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
from data_processing.cache import Cache, default_folder, digest, file_digest, write_values
from data_processing.features import load_features
from data_processing.tasks import find_task
from transformer.tokenization import BertTokenizer

SST2 = find_task("SST-2")
ROWS = [["sentence", "label"], ["A film", "1"], ["a bad film", "0"]]
LARGE = 10**9


def tokenizer(folder: Path, *words: str, lower: bool = True) -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", *words]
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return BertTokenizer.from_pretrained(folder, lower)


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """The files that were read and tokenized."""
    seen: list[Path] = []
    read = features.read_examples

    def reading(path, task):
        seen.append(path)
        return read(path, task)

    monkeypatch.setattr(features, "read_examples", reading)
    return seen


def key(number: int) -> str:
    return f"{number:032x}"


def entries(folder: Path) -> list[str]:
    """What lies there, entries by their numbers."""
    names = sorted(path.name for path in (folder / "features").iterdir())
    return [f"key{int(name, 16)}" if len(name) == 32 else name for name in names]


def test_features_are_the_same_when_they_are_found_again(tmp_path, made):
    path, words, cache = write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path), Cache(tmp_path / "c", LARGE)
    first, second = (load_features(path, SST2, words, 16, cache) for _ in range(2))
    assert made == [path]
    for name in ("tokens", "offsets", "first_lengths", "labels"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
        assert getattr(first, name).dtype == getattr(second, name).dtype
    assert not second.tokens.flags.writeable  # one copy for all processes


def test_whatever_features_depend_on_makes_them_anew(tmp_path, made):
    cache, path = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS)
    words = tokenizer(tmp_path)
    load_features(path, SST2, words, 16, cache)
    ways = [
        (path, SST2, words, 8),
        (path, SST2, tokenizer(tmp_path, "bad"), 16),
        (path, SST2, tokenizer(tmp_path, lower=False), 16),
        (path, replace(SST2, labels=("1", "0")), words, 16),
        (path, replace(SST2, text_columns=(1,)), words, 16),
        (write_rows(tmp_path / "train.tsv", [*ROWS, ["a film", "1"]]), SST2, words, 16),
    ]
    for number, way in enumerate(ways, start=2):
        load_features(*way, cache)
        assert len(made) == number
    os.rename(tmp_path / "train.tsv", tmp_path / "other.tsv")  # the name tells nothing
    load_features(tmp_path / "other.tsv", SST2, words, 16, cache)
    assert len(made) == len(ways) + 1


def test_a_broken_entry_is_made_anew(tmp_path, made):
    cache, path, words = Cache(tmp_path / "c", LARGE), write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    expected = load_features(path, SST2, words, 16, cache)
    (entry,) = (tmp_path / "c/features").iterdir()
    for break_it in (
        lambda: (entry / "tokens.npy").write_bytes((entry / "tokens.npy").read_bytes()[:-1]),
        lambda: (entry / "labels.npy").unlink(),
        lambda: (entry / "offsets.npy").write_bytes(b""),
    ):
        break_it()
        assert load_features(path, SST2, words, 16, cache).tokens.tolist() == expected.tokens.tolist()
    assert len(made) == 4
    load_features(path, SST2, words, 16, cache)
    assert len(made) == 4


def test_without_a_folder_and_where_it_cannot_be_made_all_works(tmp_path, made, caplog):
    path, words = write_rows(tmp_path / "train.tsv", ROWS), tokenizer(tmp_path)
    (tmp_path / "file").write_text("no folder")
    for folder in (None, tmp_path / "file"):
        assert len(load_features(path, SST2, words, 16, Cache(folder, LARGE))) == 2
    assert [record.getMessage().split(": ")[1][:14] for record in caplog.records] == ["cannot be kept"]
    assert (tmp_path / "file").read_text() == "no folder"


def test_the_folder_stays_within_its_limit_and_what_was_used_last_stays(tmp_path):
    cache = Cache(tmp_path, 3500)
    for number in range(3):
        cache.put("features", key(number), {"x": np.zeros(100)})  # 928 bytes each
        os.utime(tmp_path / "features" / key(number), (number, number))
    assert cache.get("features", key(0), ["x"]) is not None  # used just now
    cache.put("features", key(3), {"x": np.zeros(100)})
    assert entries(tmp_path) == ["key0", "key2", "key3"]
    cache.put("features", key(9), {"x": np.zeros(1000)})
    assert entries(tmp_path) == ["key0", "key2", "key3"]


def test_leftovers_go_once_nobody_can_be_making_them(tmp_path):
    cache = Cache(tmp_path, LARGE)
    for name, age in (("making-old", 48 * 3600), ("making-new", 60)):
        (tmp_path / "features" / name).mkdir(parents=True)
        os.utime(tmp_path / "features" / name, (time.time() - age,) * 2)
    cache.put("features", key(7), {"x": np.zeros(3)})
    assert entries(tmp_path) == ["key7", "making-new"]


def test_a_disk_that_is_full_keeps_nothing(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    Cache(tmp_path, LARGE).put("features", key(7), {"x": np.zeros(3)})
    assert entries(tmp_path) == []
    assert "No space left on device" in caplog.text


def test_keys_tell_values_apart(tmp_path):
    assert digest(a=1, b=b"x") == digest(b=b"x", a=1)
    assert len({digest(a=1), digest(a="1"), digest(b=1), digest(a=b"1"), digest(a=[1])}) == 5
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_folder_is_the_users_own(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/tinybert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/tinybert")


def test_what_is_the_users_own_in_the_folder_is_never_removed(tmp_path):
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
    cache = Cache(tmp_path, 1000)
    for number in (5, 6):
        cache.put("features", key(number), {"x": np.zeros(100)})
    assert all(file.is_file() for file in own)
    assert cache.get("features", key(5), ["x"]) is None
    assert cache.get("features", key(6), ["x"]) is not None


def test_entries_are_for_all_who_may_read_the_folder(tmp_path):
    (tmp_path / "features").mkdir(mode=0o755)
    Cache(tmp_path, LARGE).put("features", key(1), {"x": np.zeros(3)})
    assert (tmp_path / "features" / key(1)).stat().st_mode & 0o777 == 0o755


def test_an_entry_may_be_written_piece_by_piece(tmp_path):
    cache = Cache(tmp_path, LARGE)
    making = cache.make("features", key(1), {"x": (6, np.dtype(np.float32)), "y": (2, np.dtype(np.uint16))})
    assert cache.get("features", key(1), ["x"]) is None
    write_values(making.folder / "x.npy", 4, np.array([4, 5], dtype=np.float32))
    write_values(making.folder / "x.npy", 1, np.array([[1], [2]], dtype=np.float32))
    assert cache.get("features", key(1), ["x"]) is None
    making.keep()
    making.discard()  # which does nothing to what is kept
    found = cache.get("features", key(1), ["x", "y"])
    assert found["x"].tolist() == [0, 1, 2, 0, 4, 5]
    assert found["y"].tolist() == [0, 0]
    assert (found["x"].dtype, found["y"].dtype) == (np.float32, np.uint16)
    assert entries(tmp_path) == ["key1"]


def test_what_is_discarded_leaves_nothing(tmp_path):
    making = Cache(tmp_path, LARGE).make("features", key(1), {"x": (6, np.dtype(np.float32))})
    assert entries(tmp_path)[0].startswith("making-")
    making.discard()
    assert entries(tmp_path) == []
    with pytest.raises(OSError, match=r"x\.npy"):
        write_values(making.folder / "x.npy", 0, np.zeros(1))


def test_room_is_made_before_the_pieces_are_written(tmp_path):
    cache = Cache(tmp_path, 3500)
    for number in range(3):
        cache.put("features", key(number), {"x": np.zeros(100)})  # 928 bytes each
        os.utime(tmp_path / "features" / key(number), (number, number))
    cache.make("features", key(3), {"x": (200, np.dtype(np.float64))}).keep()
    assert entries(tmp_path) == ["key2", "key3"]  # with its header it is larger than what one of them leaves


def test_room_is_made_on_the_disk_too_where_that_suffices(tmp_path, monkeypatch):
    cache = Cache(tmp_path, LARGE)
    for number in range(3):
        cache.put("features", key(number), {"x": np.zeros(100)})
        os.utime(tmp_path / "features" / key(number), (number, number))
    disk = type("Disk", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: disk)
    cache.make("features", key(8), {"x": (1000, np.dtype(np.float64))}).discard()
    assert entries(tmp_path) == ["key0", "key1", "key2"]  # all of them would not be enough
    cache.make("features", key(9), {"x": (200, np.dtype(np.float64))}).keep()
    assert entries(tmp_path) == ["key1", "key2", "key9"]


def test_a_file_that_the_disk_has_no_room_for_is_known_at_once(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Cache(tmp_path, LARGE).make("features", key(1), {"x": (10_000, np.dtype(np.float32))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", [95, 22, None], ids=["not supported", "invalid", "no such call"])
def test_where_room_cannot_be_reserved_it_is_made_all_the_same(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    cache = Cache(tmp_path, LARGE)
    cache.make("features", key(1), {"x": (1000, np.dtype(np.float32))}).keep()
    assert cache.get("features", key(1), ["x"])["x"].tolist() == [0] * 1000


def test_what_a_dead_process_has_begun_goes_and_what_a_living_one_makes_stays(tmp_path):
    cache, arrays = Cache(tmp_path, LARGE), {"x": (6, np.dtype(np.float32))}
    dead, elsewhere = (
        tmp_path / f"features/making-{key(1)}-{machine}-abc" for machine in (platform.node(), "another-machine")
    )
    for folder in (dead, elsewhere):
        folder.mkdir(parents=True)
    living, second = (cache.make("features", key(1), arrays) for _ in range(2))
    assert not dead.exists()
    assert elsewhere.exists()  # its lock may not be seen here
    assert living.folder.exists()
    second.keep()
    living.keep()
    assert entries(tmp_path) == ["key1", elsewhere.name]


def test_without_locks_beginnings_are_left_until_they_are_stale(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    cache, arrays = Cache(tmp_path, LARGE), {"x": (6, np.dtype(np.float32))}
    living = cache.make("features", key(1), arrays)
    cache.make("features", key(1), arrays).keep()
    assert living.folder.exists()


def test_a_beginning_that_is_worked_on_is_not_stale(tmp_path):
    cache = Cache(tmp_path, LARGE)
    making = cache.make("features", key(1), {"x": (6, np.dtype(np.float32))})
    os.utime(making.folder, (0, 0))
    write_values(making.folder / "x.npy", 0, np.ones(1, dtype=np.float32))
    cache.put("features", key(2), {"x": np.zeros(3)})
    making.keep()
    assert cache.get("features", key(1), ["x"])["x"].tolist() == [1, 0, 0, 0, 0, 0]


def test_what_a_dead_process_has_begun_goes_whatever_its_key(tmp_path):
    """A stopped run has reserved gigabytes; whoever keeps anything next removes them."""
    begun = tmp_path / "teacher_states" / f"making-{key(1)}-{platform.node()}-abc"
    begun.mkdir(parents=True)
    (begun / "hidden.npy").write_bytes(b"0" * 1000)
    elsewhere = begun.with_name(f"making-{key(1)}-another.machine-abc")
    elsewhere.mkdir()
    Cache(tmp_path, LARGE).put("features", key(2), {"x": np.zeros(3)})
    assert not begun.exists()
    assert elsewhere.exists()


def test_runs_at_the_same_time_stay_within_the_limit_together(tmp_path):
    cache = Cache(tmp_path, 2000)
    first = cache.make("features", key(1), {"x": (150, np.dtype(np.float64))})
    with pytest.raises(OSError, match="other runs are writing there what --cache_limit allows"):
        cache.make("features", key(2), {"x": (150, np.dtype(np.float64))})
    first.discard()
    cache.make("features", key(2), {"x": (150, np.dtype(np.float64))}).keep()


def test_two_runs_that_keep_the_same_entry_leave_one(tmp_path, monkeypatch):
    """The other is done between the moment in which the old entry goes and the one in which ours would come."""
    cache = Cache(tmp_path, LARGE)
    ours, theirs = (cache.make("features", key(1), {"x": (3, np.dtype(np.float32))}) for _ in range(2))
    rename = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        theirs.keep()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    ours.keep()
    assert [entry.name for entry in (tmp_path / "features").iterdir()] == [key(1)]
    assert cache.get("features", key(1), ["x"])["x"].shape == (3,)
