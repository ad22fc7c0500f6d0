"""Command: how much faster data augmentation finds candidates than one word at a time, and what memory it needs.

    python benchmarks/augmentation.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased --glove_embs glove.txt

A model of BERT-base's shape with random weights is asked about the words of sentences of train.tsv in the original
implementation's way (one forward a word, of the whole input in fp32, all of the vocabulary sorted; of a word of several
pieces all vectors sorted) and in this project's. Both contexts; the ways take turns. The original's way, whose words
take as long each however many there are, is asked about the first sentences only.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import ROOT, SIZES, machine, read_lines
from data_processing.augmentation.augmenter import Augmenter, Settings
from data_processing.augmentation.glove import WordVectors, read_vectors
from data_processing.augmentation.masked_words import MaskedWords
from data_processing.augmentation.replacements import is_replaceable, new_texts
from distillation.checkpoints.outputs import save_model
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from distillation.runtime.device import choose_device, open_device, seed_process, share_cores, synchronize
from distillation.runtime.precision import cpu_has_bf16
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

SETTINGS = Settings(n=20, m=15, p=0.4, seed=42)


class OneAtATime:
    """The original implementation's way: for each word of each sentence a forward, or a sort of all vectors."""

    def __init__(self, model: BertForMaskedLM, tokenizer: BertTokenizer, vectors: WordVectors | None) -> None:
        self.model, self.tokenizer, self.vectors = model, tokenizer, vectors
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def masked(self, pieces: Sequence[str], place: int, with_original: bool) -> list[str]:
        """The whole words among the likeliest tokens of a masked piece."""
        masked = [*pieces[:place], "[MASK]", *pieces[place + 1 :]]
        tokens = ["[CLS]", *masked, "[SEP]", *([*pieces, "[SEP]"] if with_original else [])]
        segments = [0] * (len(pieces) + 2) + [1] * (len(tokens) - len(pieces) - 2)
        ids = torch.tensor([self.tokenizer.convert_tokens_to_ids(tokens)], device=self.device)
        scores = self.model(ids, torch.tensor([segments], device=self.device))[0, place + 1]
        likeliest = torch.argsort(scores, descending=True)[: SETTINGS.m].tolist()
        return [token for token in self.tokenizer.convert_ids_to_tokens(likeliest) if not token.startswith("##")]

    def nearest(self, word: str) -> list[str]:
        """The nearest words of a word, all sorted."""
        if self.vectors is None or word not in self.vectors:
            return []
        own = self.vectors.vectors[self.vectors.words.index(word)]
        order = np.argsort(-(self.vectors.vectors @ own))[1 : SETTINGS.m + 1]
        return [self.vectors.words[other] for other in order]

    def augment(self, sentence: str, number: int, with_original: bool) -> int:
        """Makes the new texts of a sentence; returns how many words were asked about."""
        words = self.tokenizer.basic_tokenize(sentence)
        pieces = [self.tokenizer.tokenize(word) for word in words]
        flat = [piece for word in pieces for piece in word]
        candidates: dict[int, list[str]] = {}
        begin = asked = 0
        for place, word in enumerate(words):
            if is_replaceable(word):
                one = len(pieces[place]) == 1
                found = self.masked(flat, begin, with_original) if one else self.nearest(word)
                candidates[place], asked = found or [word], asked + 1
            begin += len(pieces[place])
        new_texts(sentence, words, candidates, SETTINGS.n, SETTINGS.p, str(number))
        return asked


def batched(augmenter: Augmenter, sentences: Sequence[str]) -> None:
    """This project's way."""
    texts = [augmenter.tokenizer.basic_tokenize(sentence) for sentence in sentences]
    found = augmenter.candidates(texts)
    for number, (sentence, words) in enumerate(zip(sentences, texts, strict=True)):
        new_texts(sentence, words, found[number], SETTINGS.n, SETTINGS.p, str(number))


def precisions(flags: Any, device: torch.device) -> dict[str, torch.dtype | None]:
    """What is measured of fp32 and bf16."""
    bf16 = not flags.fp32 and (device.type != "cpu" or cpu_has_bf16())
    return {"fp32": None, "bf16": torch.bfloat16} if bf16 else {"fp32": None}


def parts(model: BertForMaskedLM, flags: Any, device: torch.device) -> dict[str, dict[str, Any]]:
    """For each context this project's ways by their names; models in bf16 are copies."""
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    vectors = None if flags.glove_embs is None else read_vectors(flags.glove_embs)
    made: dict[str, dict[str, Any]] = {}
    for context in ("original", "masked"):
        made[context] = {}
        for name, half in precisions(flags, device).items():
            own = BertForMaskedLM(model.config).eval().to(device)
            own.load_state_dict(model.state_dict())
            masked = MaskedWords(own, tokenizer, context == "original", half, share_cores(1))
            made[context][name] = Augmenter(SETTINGS, tokenizer, masked, vectors)
    return made


def measure_candidates(flags: Any, device: torch.device) -> None:
    """Prints words a second of each way and context."""
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    seed_process(0, 0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES[flags.size][0])).eval().to(device)
    lines = [line.split("\t")[0] for line in read_lines(flags.data_dir / "train.tsv")[1:]]
    chosen = np.random.default_rng(0).choice(len(lines), size=min(flags.sentences, len(lines)), replace=False)
    sentences = [lines[number] for number in chosen]
    ours = parts(model, flags, device)
    plain = OneAtATime(model, tokenizer, next(iter(ours["original"].values())).vectors)
    for context, ways in ours.items():
        with_original = context == "original"
        plain.augment(sentences[0], 0, with_original)
        for way in ways.values():
            batched(way, sentences[:4])
        seconds: dict[str, list[float]] = {"one word at a time": [], **{name: [] for name in ways}}
        first = sentences[: flags.one_at_a_time]
        asked = 0
        for _ in range(flags.repeat):
            begin = _now(device)
            asked = sum(plain.augment(sentence, n, with_original) for n, sentence in enumerate(first))
            seconds["one word at a time"].append(_now(device) - begin)
            before = torch.get_num_threads()
            torch.set_num_threads(1 if device.type == "cpu" else before)  # as the command does
            for name, way in ways.items():
                way._neighbours.clear()
                begin = _now(device)
                batched(way, sentences)
                seconds[name].append(_now(device) - begin)
            torch.set_num_threads(before)
        words = sum(is_replaceable(word) for sentence in sentences for word in tokenizer.basic_tokenize(sentence))
        print(
            f"--mlm_context {context}: {words} words of {len(sentences)} sentences, one at a time the {asked} of "
            f"the first {len(first)}"
        )
        counts = {name: asked if name == "one word at a time" else words for name in seconds}
        speeds = {name: counts[name] / statistics.median(values) for name, values in seconds.items()}
        for name, speed in speeds.items():
            print(f"  {name:20} {speed:9.1f} words/s {speed / speeds['one word at a time']:7.1f}x")


def measure_vectors(file: Path) -> None:
    """Prints how long vectors take to load, and neighbours of 10,000 words to find."""
    begin = time.perf_counter()
    vectors = read_vectors(file)
    loaded = time.perf_counter() - begin
    words = vectors.words[: 20_000 : max(1, min(20_000, len(vectors.words)) // 10_000)][:10_000]
    begin = time.perf_counter()
    vectors.neighbours(words, SETTINGS.m)
    found = time.perf_counter() - begin
    shape = " x ".join(map(str, vectors.vectors.shape))
    print(f"vectors: {shape} loaded in {loaded:.2f} s; neighbours of {len(words)} words in {found:.1f} s")


def measure_memory(flags: Any) -> None:
    """Prints the most memory of the command on a CPU, on more and more rows, with a tiny model."""
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    header, *lines = read_lines(flags.data_dir / "train.tsv")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES["tiny"][0]))
        save_model(folder / "bert", model.config, model.state_dict(), tokenizer)
        for count in flags.memory:
            data = folder / str(count)
            data.mkdir()
            rows = (lines * -(-count // len(lines)))[:count]
            (data / "train.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
            command = [sys.executable, str(ROOT / "data_processing" / "data_augmentation.py"), "--data_dir", str(data)]
            command += ["--task_name", "SST-2", "--pretrained_bert_model", str(folder / "bert"), "--no_glove"]
            command += ["--do_lower_case", "--device", "cpu", "--mlm_context", "masked", "--N", "2"]
            command += ["--overwrite_output_file", "--precision"]
            peaks = {name: _peak([*command, name]) for name in precisions(flags, torch.device("cpu"))}
            print(f"memory: {count} rows, " + ", ".join(f"{name} {peak} MB" for name, peak in peaks.items()))


def _peak(command: Sequence[str]) -> int:
    """The most memory of a command, in MB."""
    done = subprocess.run([sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the command failed: {done.stderr.strip().splitlines()[-1]}")
    return round(int(done.stdout.split()[-1]) / 1024)


# The largest child's peak is that of the command alone, since this one process has no other.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def main(arguments: Sequence[str]) -> None:
    """Measures and prints."""
    parser = OneLineParser(prog="augmentation.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder, with train.tsv")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    parser.add_argument("--glove_embs", type=path, help="word vectors; without them words of several pieces are left")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--one_at_a_time", type=int, default=40, help="of them, asked about in the original's way")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="leave bf16 out")
    parser.add_argument("--memory", type=int, nargs="*", default=[], help="numbers of rows to measure memory with")
    parser.add_argument("--device", default="cpu", choices=("npu", "gpu", "cpu", "auto"))
    parser.add_argument("--size", default="base", choices=tuple(SIZES), help="tiny: only shows that it runs")
    flags = parser.parse_args(list(arguments))
    if min(flags.sentences, flags.one_at_a_time, flags.repeat, *flags.memory) < 1:
        raise UserError("--sentences, --one_at_a_time, --repeat, --memory: expected numbers of 1 or more")
    print(machine())
    if flags.glove_embs is not None:
        measure_vectors(flags.glove_embs)
    measure_candidates(flags, open_device(choose_device(flags.device), 0))
    measure_memory(flags)


if __name__ == "__main__":
    sys.exit(run_entry("augmentation.py", main))
