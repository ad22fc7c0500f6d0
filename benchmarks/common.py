"""What the benchmarks share: the machine's name, models of random weights, rows of real text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillation.checkpoint import save_model
from distillation.device import seed_process
from transformer.configuration import RELU_HEAD_ARCHITECTURE, BertConfig
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

ROOT = Path(__file__).resolve().parent.parent
TINYBERT4: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200}


def make_models(folder: Path, vocabulary: Path) -> None:
    """Random weights in the shapes of BERT-base and TinyBERT4, with a real vocabulary."""
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    seed_process(0, 0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "architectures": [RELU_HEAD_ARCHITECTURE]}
    for name, config in (("teacher", BertConfig(**sizes)), ("student", BertConfig(**sizes, **TINYBERT4))):
        model = TinyBertForSequenceClassification(config, 2, 768 if name == "student" else 0)
        save_model(folder / name, config, model.state_dict(), tokenizer)


def make_data(folder: Path, source: Path, count: int) -> None:
    """`count` rows from all over train.tsv, and a few for dev.tsv."""
    lines = (source / "train.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(lines) < 2:
        raise UserError(f"{source / 'train.tsv'}: holds no examples")
    chosen = np.random.default_rng(0).choice(np.arange(1, len(lines)), size=min(count, len(lines) - 1), replace=False)
    folder.mkdir()
    (folder / "train.tsv").write_text("\n".join([lines[0], *(lines[n] for n in chosen)]) + "\n", encoding="utf-8")
    (folder / "dev.tsv").write_text("\n".join(lines[:65]) + "\n", encoding="utf-8")


def machine() -> str:
    """What the figures were measured on."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {cores} cores{gpu}, torch {torch.__version__}"
