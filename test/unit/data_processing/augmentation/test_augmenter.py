"""Candidates and new texts of data augmentation, against the plain way: one word at a time."""

import itertools
import random

import numpy as np
import pytest
import torch
from augmentation_cases import SENTENCES, VOCABULARY, glove, likeliest, masked_lm, nearest

from data_processing.augmentation.augmenter import Augmenter, Settings
from data_processing.augmentation.glove import WordVectors, read_vectors
from data_processing.augmentation.masked_words import MaskedWords, place_in
from data_processing.augmentation.replacements import STOP_WORDS, is_replaceable, new_texts
from data_processing.examples import Row
from distillation.runs.mlm_head import load_masked_lm
from transformer.heads import BertForMaskedLM

LEAST_GAP = 1e-5  # between the last candidate and the next token: closer ones may come in either order


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return masked_lm(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return read_vectors(glove(tmp_path_factory.mktemp("vectors") / "vectors.txt"))


def augmenter(bert, vectors=None, with_original=True, n=20, m=15, p=0.4, seed=42, half=None, threads=1) -> Augmenter:
    model, tokenizer, _ = load_masked_lm(bert, True)
    masked = MaskedWords(model, tokenizer, with_original, half, threads)
    return Augmenter(Settings(n, m, p, seed), tokenizer, masked, vectors)


@pytest.mark.parametrize("with_original", [True, False])
@pytest.mark.parametrize("m", [3, 15])
def test_candidates_are_those_of_one_word_at_a_time(bert, vectors, with_original, m):
    """Trap 35: batched, of one piece and of several, with capitals, punctuation and unknown words around them."""
    made = augmenter(bert, vectors, with_original, m=m)
    plain = BertForMaskedLM.from_pretrained(bert).eval()
    texts = [made.tokenizer.basic_tokenize(text) for text, _ in SENTENCES]
    kinds = set()
    for words, found in zip(texts, made.candidates(texts), strict=True):
        for place, word in enumerate(words):
            pieces = made.tokenizer.tokenize(word)
            if not is_replaceable(word):
                kinds.add("kept")
                assert place not in found
            elif len(pieces) == 1:
                expected, gap = likeliest(plain, made.tokenizer, words, place, m, with_original)
                assert gap > LEAST_GAP
                assert set(found.get(place, [])) == expected
                assert len(found.get(place, [])) == len(expected)
                kinds.add("one piece" if expected else "no candidate")
            else:
                assert found[place] == nearest(word, m)
                kinds.add("several pieces")
    assert kinds >= {"kept", "one piece", "several pieces"}


def test_the_contexts_differ(bert):
    texts = [augmenter(bert).tokenizer.basic_tokenize(text) for text, _ in SENTENCES]
    both, alone = (augmenter(bert, with_original=kind).candidates(texts) for kind in (True, False))
    assert both != alone


@pytest.mark.parametrize("with_original", [True, False])
def test_long_texts_keep_what_is_around_the_word(bert, with_original):
    """Trap 38: the model has 64 positions; a text that fits is asked about whole, a longer one by a window."""
    made = augmenter(bert, with_original=with_original)
    assert made.masked.longest == (30 if with_original else 62)
    plain = BertForMaskedLM.from_pretrained(bert).eval()
    choose = random.Random(1)
    names = [word for word in VOCABULARY[5:60] if word.isalpha()]
    for length in (made.masked.longest, made.masked.longest + 1, 300):
        words = choose.choices(names, k=length)
        found = made.candidates([words])[0]
        for place in (0, 7, length // 2, length - 1):
            if not is_replaceable(words[place]):
                continue
            start = min(max(0, place - made.masked.longest // 2), length - made.masked.longest)
            window = words[start : start + made.masked.longest]
            expected, gap = likeliest(plain, made.tokenizer, window, place - start, 15, with_original)
            assert gap > LEAST_GAP
            assert set(found.get(place, [])) == expected


def test_a_window_holds_its_word():
    for length, longest in itertools.product(range(1, 12), range(1, 9)):
        for index in range(length):
            place = place_in(range(100, 100 + length), index, longest)
            assert place.pieces[place.number] == 100 + index
            assert len(place.pieces) == min(length, longest)


def test_a_cased_models_capitals_stay(bert, vectors):
    model, tokenizer, _ = load_masked_lm(bert, False)
    made = Augmenter(Settings(20, 15, 1.0, 0), tokenizer, MaskedWords(model, tokenizer, True), vectors)
    words = tokenizer.basic_tokenize("Movie MOVIE movie")
    assert words == ["Movie", "MOVIE", "movie"]
    assert list(made.candidates([words])[0]) == [2]


@pytest.mark.parametrize("lower", [True, False])
def test_neighbours_that_differ_in_case_alone_are_one_where_text_is_lower_cased(bert, lower):
    """As GloVe's 840B, which tells case apart: new texts are of the case that the tokenizer gives, and distinct."""
    words = ["unwantable", "Unwantable", "UNWANTABLE", "Quickly", "slow", "Slow", "hating", "quickly"]
    vectors = WordVectors(words, np.array([[1.0, n / 10] for n in range(len(words))], dtype=np.float32))
    model, tokenizer, _ = load_masked_lm(bert, lower)
    made = Augmenter(Settings(20, 3, 1.0, 0), tokenizer, MaskedWords(model, tokenizer, True), vectors)
    expected = ["quickly", "slow", "hating"] if lower else ["Unwantable", "UNWANTABLE", "Quickly"]
    assert made.candidates([["unwantable"]]) == [{0: expected}]
    texts = made.augment([Row(("unwantable",), None)], 0)[0]
    assert sorted(text for (text,) in texts[1:]) == sorted(expected)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_stands_beside_a_text_does_not_matter(bert, vectors, half, threads):
    """Threads share out the batches; the batches are the same, so candidates are equal whatever their number."""
    texts = [augmenter(bert).tokenizer.basic_tokenize(text) for text, _ in SENTENCES] * 30
    one = augmenter(bert, vectors, half=half).candidates(texts)
    assert augmenter(bert, vectors, half=half, threads=threads).candidates(texts) == one
    assert one[: len(SENTENCES)] == one[-len(SENTENCES) :]
    if half is None:
        assert [made for text in texts[:5] for made in augmenter(bert, vectors).candidates([text])] == one[:5]


def test_half_precision_finds_what_fp32_finds_where_the_difference_is_clear(bert):
    texts = [augmenter(bert).tokenizer.basic_tokenize(text) for text, _ in SENTENCES]
    exact, half = (augmenter(bert, half=kind).candidates(texts) for kind in (None, torch.bfloat16))
    same = total = 0
    for ours, theirs in zip(exact, half, strict=True):
        for place in ours:
            same += len(set(ours[place]) & set(theirs.get(place, [])))
            total += len(ours[place])
    assert same > 0.9 * total


def test_words_are_replaced_with_probability_p():
    """Over 10,000 words, each with candidates that differ from it, within four standard errors."""
    words = [f"w{n}" for n in range(10)]
    candidates = {n: ["x", "y"] for n in range(10)}
    for p in (0.1, 0.4, 0.9):
        replaced = drawn = 0
        for row in range(1000):
            (made,) = new_texts("w", words, candidates, 1, p, f"42 {row} 0") or [" ".join(words)]
            replaced += sum(a != b for a, b in zip(made.split(), words, strict=True))
            drawn += made.split().count("x")
        assert abs(replaced - 10_000 * p) < 4 * np.sqrt(10_000 * p * (1 - p))
        assert abs(drawn - replaced / 2) < 4 * np.sqrt(replaced / 4)


def test_new_texts_are_new_and_few():
    words, candidates = ["a", "b"], {1: ["b", "c"]}
    made = new_texts("A  b", words, candidates, 50, 0.5, "1")
    assert made == ["a c"]  # neither the original, nor its words, nor a text twice
    assert new_texts("a b", words, {}, 50, 0.5, "1") == []
    many = new_texts("a b", words, {1: [str(n) for n in range(1000)]}, 20, 1.0, "1")
    assert len(many) == len(set(many)) <= 20
    assert new_texts("a b", words, {1: [str(n) for n in range(1000)]}, 20, 1.0, "1") == many
    assert new_texts("a b", words, {1: [str(n) for n in range(1000)]}, 20, 1.0, "2") != many


def test_sides_of_a_pair_stand_beside_the_others_original(bert, vectors):
    """Trap 36."""
    rows = [Row((SENTENCES[n][0], SENTENCES[n + 1][0]), None) for n in range(3)]
    for row, texts in zip(rows, augmenter(bert, vectors).augment(rows, 0), strict=True):
        assert texts[0] == row.texts
        first = [pair for pair in texts[1:] if pair[1] == row.texts[1]]
        second = [pair for pair in texts[1:] if pair[0] == row.texts[0]]
        assert first
        assert second
        assert texts[1:] == first + second
        assert max(len(first), len(second)) <= 20


def test_a_rows_texts_depend_on_its_number_and_the_seed(bert, vectors):
    rows = [Row((text,), None) for text, _ in SENTENCES]
    made = augmenter(bert, vectors).augment(rows, 10)
    assert augmenter(bert, vectors).augment(rows, 10) == made
    assert augmenter(bert, vectors).augment(rows[2:], 12) == made[2:]
    assert augmenter(bert, vectors).augment(rows, 11) != made
    assert augmenter(bert, vectors, seed=43).augment(rows, 10) != made


def test_stop_words():
    assert len(STOP_WORDS) == 173
    assert STOP_WORDS.isdisjoint({"what", "which", "who", "whom", "when", "where", "why", "how"})
    assert {"'s", "'re", "wouldn", "i", "the"} <= STOP_WORDS
    words = ["movie", "why", "the", "x1", "don't", "café", "Movie", "", "-", "a"]
    assert [word for word in words if is_replaceable(word)] == ["movie", "why"]
