"""Command: words per second for which data augmentation finds candidates, beside one word at a time.

    python benchmarks/augmentation.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased --glove_embs glove.txt

A model of BERT-base's shape with random weights predicts words of sentences of train.tsv, and vectors give neighbours:
in the original implementation's way (one forward pass per word, of the whole input, in fp32, with a sort of the whole
vocabulary; for a word of several pieces a sort of all vectors) and in this project's, with each context. The original's
time per word does not depend on their number, so that it has the first sentences only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import SIZES, build_parser, machine, number, read_lines
from data_processing.augmentation.augmenter import Augmenter, Settings
from data_processing.augmentation.glove import WordVectors, read_vectors
from data_processing.augmentation.masked_words import MaskedWords
from data_processing.augmentation.replacements import is_replaceable, new_texts
from distillation.flags import path
from distillation.launch import run_entry
from distillation.runtime.device import choose_device, open_device, seed_process, share_cores, synchronize
from distillation.runtime.precision import cpu_has_bf16
from transformer.configuration import BertConfig
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

SETTINGS = Settings(n=20, m=15, p=0.4, seed=42)


@dataclass
class OneAtATime:
    """The original implementation's way: for each word a forward pass, or a sort of all vectors."""

    model: BertForMaskedLM
    tokenizer: BertTokenizer
    vectors: WordVectors | None
    with_original: bool

    @torch.no_grad()
    def predict(self, pieces: Sequence[str], place: int) -> list[str]:
        """Return the whole words among the most probable tokens of a masked piece."""
        masked = [*pieces[:place], "[MASK]", *pieces[place + 1 :]]
        tokens = ["[CLS]", *masked, "[SEP]", *([*pieces, "[SEP]"] if self.with_original else [])]
        segments = [0] * (len(pieces) + 2) + [1] * (len(tokens) - len(pieces) - 2)
        ids = [self.tokenizer.convert_tokens_to_ids(tokens)]
        device = next(self.model.parameters()).device
        scores = self.model(torch.tensor(ids, device=device), torch.tensor([segments], device=device))[0, place + 1]
        best = torch.argsort(scores, descending=True)[: SETTINGS.m].tolist()
        return [token for token in self.tokenizer.convert_ids_to_tokens(best) if not token.startswith("##")]

    def nearest(self, word: str) -> list[str]:
        """Return the nearest words of a word."""
        if self.vectors is None or word not in self.vectors:
            return []
        own = self.vectors.vectors[self.vectors.words.index(word)]
        order = np.argsort(-(self.vectors.vectors @ own))[1 : SETTINGS.m + 1]
        return [self.vectors.words[other] for other in order]

    def augment(self, sentences: Sequence[str]) -> None:
        """Make the new texts of sentences."""
        for key, sentence in enumerate(sentences):
            words = self.tokenizer.basic_tokenize(sentence)
            pieces = [self.tokenizer.tokenize(word) for word in words]
            flat = [piece for word in pieces for piece in word]
            candidates: dict[int, list[str]] = {}
            begin = 0
            for place, word in enumerate(words):
                if is_replaceable(word):
                    found = self.predict(flat, begin) if len(pieces[place]) == 1 else self.nearest(word)
                    candidates[place] = found or [word]
                begin += len(pieces[place])
            new_texts(sentence, words, candidates, SETTINGS.n, SETTINGS.p, str(key))


def augment_in_batches(new_augmenter: Callable[[], Augmenter], sentences: Sequence[str]) -> None:
    """Make the new texts of sentences in this project's way."""
    augmenter = new_augmenter()  # one with neighbours of words from an earlier call would be faster
    texts = [augmenter.tokenizer.basic_tokenize(sentence) for sentence in sentences]
    for key, candidates in enumerate(augmenter.candidates(texts)):
        new_texts(sentences[key], texts[key], candidates, SETTINGS.n, SETTINGS.p, str(key))


def time_of(work: Callable[[], None], device: torch.device, threads: int) -> float:
    """Return the seconds of a piece of work, in which each operation may use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    torch.set_num_threads(before)
    return time.perf_counter() - begin


def measure(flags: argparse.Namespace) -> None:
    """Print words per second of each way and context."""
    device = open_device(choose_device(flags.device), 0)
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    vectors = None if flags.glove_embs is None else read_vectors(flags.glove_embs)
    seed_process(0, 0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES[flags.size][0])).eval().to(device)
    lines = [line.split("\t")[0] for line in read_lines(flags.data_dir / "train.tsv")[1:]]
    sentences = lines[:: max(1, len(lines) // flags.sentences)][: flags.sentences]
    half = {"fp32": None} | ({"bf16": torch.bfloat16} if device.type != "cpu" or cpu_has_bf16() else {})
    for context in ("original", "masked"):
        plain = OneAtATime(model, tokenizer, vectors, context == "original")
        ways = {"one word at a time": (plain.augment, sentences[: flags.one_at_a_time], torch.get_num_threads())}
        for name, dtype in half.items():
            own = BertForMaskedLM(model.config).eval().to(device)
            own.load_state_dict(model.state_dict())
            masked = MaskedWords(own, tokenizer, context == "original", dtype, share_cores(1))
            augmenter = partial(Augmenter, SETTINGS, tokenizer, masked, vectors)
            ways[name] = partial(augment_in_batches, augmenter), sentences, 1  # the batches share the threads
        print(f"--mlm_context {context}")
        base = 0.0
        for name, (augment, texts, threads) in ways.items():
            augment(texts[:4])  # warms up
            seconds = [time_of(partial(augment, texts), device, threads) for _ in range(flags.repeat)]
            words = sum(is_replaceable(word) for text in texts for word in tokenizer.basic_tokenize(text))
            speed = words / statistics.median(seconds)
            base = base or speed
            print(f"  {name:20} {words:7} words {speed:9.1f} words/s {speed / base:7.1f}x", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Print the figures."""
    parser = build_parser("augmentation.py", __doc__)
    parser.add_argument("--glove_embs", type=path, help="word vectors; without them words of several pieces stay")
    parser.add_argument("--sentences", type=number, default=300)
    parser.add_argument("--one_at_a_time", type=number, default=40, help="of them, in the original's way")
    parser.add_argument("--repeat", type=number, default=1)
    flags = parser.parse_args(list(arguments))
    print(machine())
    measure(flags)


if __name__ == "__main__":
    sys.exit(run_entry("augmentation.py", main))
