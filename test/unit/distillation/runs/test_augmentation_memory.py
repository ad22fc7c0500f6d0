"""Augmentation's memory does not grow with its rows: not with the kernels that oneDNN makes, of one to two MB each."""

import os
import platform
import random
import subprocess
from pathlib import Path

from augmentation_cases import VOCABULARY, Place
from cases import Golden, report_lack

from data_processing.augmentation.augmenter import BLOCK
from transformer import packed_inference

WORDS = [word for word in VOCABULARY[5:60] if word.isalpha()]


def problems(folder: Path, blocks: int, precision: str) -> set[str]:
    """What oneDNN was asked to compute for a file of so many blocks of rows, apart from the numbers themselves."""
    choose = random.Random(5)
    texts = [choose.choices(WORDS, k=int(choose.triangular(1, 40, 3))) for _ in range(blocks * BLOCK)]
    place = Place(folder, [("sentence", "label"), *((" ".join(text), "1") for text in texts)])
    teacher = Golden("sst2_small").workplace(folder / "golden").teacher
    told = {"precision": precision, "mlm_context": "masked", "relabel": "teacher", "teacher_model": teacher}
    flags = place.command(N=2, **told)
    said = subprocess.run(
        flags, env={**os.environ, "ONEDNN_VERBOSE": "2"}, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    ).stdout
    lines = [line.split(",") for line in said.splitlines() if ",create:cache_miss," in line]
    return {",".join(line[5:-1]) for line in lines}  # without what comes before the kind, and the time it took


def test_more_rows_are_no_more_kernels_in_half_precision(tmp_path):
    if not packed_inference.can_pack():
        report_lack("bf16 products of oneDNN; augmentation takes fp32 by itself")
        assert problems(tmp_path / "auto", 1, "auto") == problems(tmp_path / "fp32", 1, "fp32")
        return
    few, many = (problems(tmp_path / str(blocks), blocks, "bf16") for blocks in (2, 6))
    assert len(few) > 20
    assert len(many) <= 1.2 * len(few)


def test_in_fp32_there_are_no_kernels(tmp_path):
    made = problems(tmp_path, 1, "fp32")
    if platform.machine() not in ("x86_64", "AMD64"):
        report_lack("products in fp32 without oneDNN, which are x86's")
        return
    assert made == set()
