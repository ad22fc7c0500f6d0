"""Features: token ids of examples, equal to the original's."""

import itertools

import numpy as np
import pytest
from cases import write_rows

from data_processing.batching import Collator
from data_processing.examples import Examples, read_examples
from data_processing.features import Features, make_features
from data_processing.tasks import find_task
from transformer.tokenization import BertTokenizer

WORDS = [f"a{n}" for n in range(40)]
CLS, SEP, FIRST = 2, 3, 5  # the ids of [CLS], [SEP] and the first word


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizer:
    """A vocabulary in which each word of a test is one WordPiece."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return BertTokenizer.from_pretrained(tmp_path)


def examples(*texts: list[str]) -> Examples:
    return Examples(texts, np.zeros(len(texts[0]), dtype=np.int64))


def ids_of(features: Features, number: int) -> list[int]:
    return features.tokens[features.offsets[number] : features.offsets[number + 1]].tolist()


def test_features_equal_the_originals(golden, tmp_path):
    place = golden.workplace(tmp_path)
    rows = read_examples(place.data / "train.tsv", find_task(place.task))
    features = make_features(rows, BertTokenizer.from_pretrained(place.teacher), place.max_seq_length)
    batch = Collator(to_maximum=True, max_seq_length=place.max_seq_length).collate(features, np.arange(len(features)))
    for tensor, name in zip(batch[:4], ("input_ids", "segment_ids", "input_mask", "label_ids"), strict=True):
        assert np.array_equal(tensor.numpy(), golden.figures[f"feat_{name}"]), name
    assert np.array_equal(features.lengths, golden.figures["feat_seq_lengths"])


def truncated_piece_by_piece(first: int, second: int, room: int) -> tuple[int, int]:
    """The original's loop: the longer text loses its last piece, the second if both are of one length."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


@pytest.mark.parametrize("max_seq_length", [*range(3, 20), 128])
def test_pairs_are_truncated_as_by_the_original(tokenizer, max_seq_length):
    lengths = list(itertools.product(range(18), range(18)))
    texts = ([" ".join(WORDS[: pair[side]]) for pair in lengths] for side in range(2))
    features = make_features(examples(*texts), tokenizer, max_seq_length)
    for number, pair in enumerate(lengths):
        first, second = truncated_piece_by_piece(*pair, max_seq_length - 3)
        expected = [CLS, *range(FIRST, FIRST + first), SEP, *range(FIRST, FIRST + second), SEP]
        assert ids_of(features, number) == expected
        assert features.first_lengths[number] == first + 2


def test_a_single_text_keeps_its_beginning(tokenizer):
    features = make_features(examples([" ".join(WORDS), " ".join(WORDS[:14]), ""]), tokenizer, 16)
    whole = [CLS, *range(FIRST, FIRST + 14), SEP]
    assert [ids_of(features, number) for number in range(3)] == [whole, whole, [CLS, SEP]]


@pytest.mark.parametrize(
    "text", ["", "   ", "\u200b", "a0 " * 200_000, "a" * 200_000, "\ufffd", "\x00", '"', "\x85\u2028\x0c"]
)
def test_any_text_becomes_an_example(tokenizer, tmp_path, text):
    path = write_rows(tmp_path / "train.tsv", [["sentence", "label"], ["a1", "0"], [text, "1"], ["a2", "0"]])
    rows = read_examples(path, find_task("SST-2"))
    assert rows.labels.tolist() == [0, 1, 0]
    features = make_features(rows, tokenizer, 16)
    assert ids_of(features, 0) == [CLS, FIRST + 1, SEP]
    assert ids_of(features, 2) == [CLS, FIRST + 2, SEP]
    assert 2 <= features.lengths[1] <= 16
