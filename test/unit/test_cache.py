"""What is kept between runs: found again only where all it depends on is the same, bounded, and never in the way."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import write_rows

from data_processing import features
from data_processing.cache import Cache, default_folder, digest, file_digest
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
