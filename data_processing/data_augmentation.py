"""Augment a task's training file: train.tsv becomes train_aug.tsv, each text followed by up to N new ones.

    python data_processing/data_augmentation.py --pretrained_bert_model bert_base_uncased \
        --glove_embs glove.6B.300d.txt --glue_dir glue_dir --task_name SST-2

This is an entry, as main.py: the method is in `augmentation/`, the run in `distillation/runs/augment.py`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python looks for modules in this file's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":  # the imports below take seconds
    from distillation.runtime.signals import end_quietly

    end_quietly("data_augmentation.py")

from collections.abc import Sequence

from distillation.launch import run_entry
from distillation.runs.augment import augment
from distillation.runs.augment_options import PROG, parse_augment_options


def main(arguments: Sequence[str]) -> None:
    """Augment the file that the flags name."""
    augment(parse_augment_options(arguments))


if __name__ == "__main__":
    sys.exit(run_entry(PROG, main))
