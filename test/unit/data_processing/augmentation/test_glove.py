"""Word vectors: files as GloVe writes them and as they come, and neighbours against all cosines sorted."""

import gzip
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest

from data_processing.augmentation import glove
from data_processing.augmentation.glove import WordVectors, read_vectors
from transformer.errors import UserError


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def random_file(path: Path, words: int, dimension: int) -> tuple[Path, np.ndarray]:
    vectors = np.random.default_rng(1).standard_normal((words, dimension)).astype(np.float32)
    lines = (f"w{n} " + " ".join(f"{value:.7g}" for value in row) for n, row in enumerate(vectors))
    return write(path, *lines), vectors


@pytest.mark.parametrize("dimension", [2, 50, 300])
def test_every_number_is_read(tmp_path, dimension):
    path, vectors = random_file(tmp_path / "v.txt", 2345, dimension)
    read = read_vectors(path)
    assert read.words == [f"w{n}" for n in range(2345)]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(read.vectors, vectors / lengths, atol=1e-6)


def test_only_the_first_are_read(tmp_path):
    path, _ = random_file(tmp_path / "v.txt", 30, 3)
    assert read_vectors(path, most=20).words == [f"w{n}" for n in range(20)]


def test_gzip_is_told_by_its_content(tmp_path):
    path, _ = random_file(tmp_path / "v.txt", 30, 3)
    packed = tmp_path / "packed.txt"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_vectors(packed).digest() == read_vectors(path).digest()
    packed.write_bytes(gzip.compress(path.read_bytes())[:-20])
    with pytest.raises(UserError, match=r"packed.txt: cannot be read"):
        read_vectors(packed)


def test_words_with_spaces(tmp_path):
    """Trap 38: GloVe's 840B has such words."""
    read = read_vectors(write(tmp_path / "v.txt", "the 1 2 3", ". . . 4 5 6", "at the 1st 7 8 9", "of 1 0 0"))
    assert read.words == ["the", ". . .", "at the 1st", "of"]


def test_lines_that_are_none_are_counted_and_named(tmp_path, caplog):
    lines = [f"w{n} {n} 1 2" for n in range(100)]
    lines[4], lines[17], lines[50], lines[80] = "short 1 2", "letters 1 x 3", "nan 1 nan 3", ""
    with caplog.at_level(logging.WARNING):
        read = read_vectors(write(tmp_path / "v.txt", *lines))
    assert len(read.words) == 96
    assert "4 of 100 lines are not a word and 3 numbers, and were left out (line 5, 18, 51, 81)" in caplog.text
    np.testing.assert_allclose(read.vectors[95] * np.linalg.norm([99, 1, 2]), [99, 1, 2], rtol=1e-5)


def test_a_first_line_with_the_counts_is_no_word(tmp_path):
    read = read_vectors(write(tmp_path / "v.vec", "2 3", "the 1 2 3 ", "of 4 5 6 "))
    assert read.words == ["the", "of"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "is empty"),
        (["", ""], "is empty|no file of word vectors|holds no word vectors"),
        (["the quick brown fox"] * 5, "holds no word vectors"),
        (["the", "of"], "is not a file of word vectors"),
        (["a 1 2 3"] * 50 + ["b 1 2 3 4 5"] * 40, "different dimensions, 3 and, as in line 60, 5"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        read_vectors(write(tmp_path / "v.txt", *lines))


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "v.bin"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(UserError):
        read_vectors(path)
    with pytest.raises(UserError, match="not found"):
        read_vectors(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        read_vectors(tmp_path)


def test_a_file_that_unpacks_to_more_than_word_vectors_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "vectors.gz"
    path.write_bytes(gzip.compress(b"film 0.1 0.2 0.3\nmovie " + b"0" * 3_000_000))
    with pytest.raises(UserError, match=r"line 2 is longer than 1048576 bytes: not a file of word vectors"):
        read_vectors(path)
    monkeypatch.setattr(glove, "_MOST_BYTES", 40)
    path.write_bytes(b"film 0.1 0.2 0.3\n" * 3)
    with pytest.raises(UserError, match=r"its lines are too long"):
        read_vectors(path)


def test_neighbours_are_those_of_all_cosines_sorted():
    random = np.random.default_rng(2)
    vectors = random.standard_normal((700, 20)).astype(np.float32)
    vectors[30] = 2 * vectors[31]  # of one direction
    vectors[40] = 0
    words = [f"w{n}" for n in range(700)]
    read = WordVectors(words, vectors.copy())
    exact = vectors.astype(np.float64)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-30)
    asked = [*words[:300], "none"]
    found = read.neighbours(asked, 15)
    assert found["none"] == []
    for place, word in enumerate(words[:300]):
        cosines = exact @ exact[place]
        cosines[place] = -np.inf
        if place != 40:
            assert found[word] == [words[n] for n in np.argsort(-cosines, kind="stable")[:15]]
    assert found["w30"][0] == "w31"
    assert read.neighbours(["w7"], 15)["w7"] == found["w7"]
    assert len(WordVectors(["a", "b"], np.eye(2, dtype=np.float32)).neighbours(["a"], 15)["a"]) == 1


def test_a_word_that_stands_twice_counts_once():
    read = WordVectors(["a", "b", "a"], np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32))
    assert read.neighbours(["a"], 5)["a"] == ["b"]


def test_huge_and_tiny_values_have_directions_too(tmp_path):
    lines = ("a 3e38 -3e38 0", "b 1e30 1e30 1e30", "c 3e-25 4e-25 0", "d 1 1 1", "e 0 0 0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_vectors(write(tmp_path / "v.txt", *lines))
    h, t = 0.5**0.5, 3**-0.5
    np.testing.assert_allclose(read.vectors, [[h, -h, 0], [t, t, t], [0.6, 0.8, 0], [t, t, t], [0, 0, 0]], rtol=1e-6)
    assert read.vectors.dtype == np.float32
    assert read.neighbours(["b"], 1)["b"] == ["d"]
