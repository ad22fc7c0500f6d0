"""A model's folder: checked before a run, written so that a kill leaves a whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import CONFIG_NAME, SAFETENSORS_NAME, VOCAB_NAME, WEIGHTS_NAME, write_weights
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import TOKENIZER_CONFIG_NAME, tokenizer_config


def check_output_dir(output_dir: Path, overwrite: bool, sources: tuple[Path | None, ...], hint: str = "") -> None:
    """Checks, and makes nothing, that a model may be written there.

    Args:
        overwrite: whether the folder may hold something.
        sources: folders that are read.
        hint: what the message about a folder that is not empty ends with.

    Raises:
        UserError: it is a file, holds something already, or is a folder that the run reads from.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file, --output_dir needs a folder")
    for source in sources:
        if source is not None and source.resolve() == output_dir.resolve():
            raise UserError(f"{output_dir}: --output_dir is a folder that this run reads from; give another one")
        if source is not None and output_dir.resolve() in source.resolve().parents and output_dir.is_dir():
            raise UserError(f"{output_dir}: --output_dir holds {source}, which this run reads; give another one")
    for name in (WEIGHTS_NAME, SAFETENSORS_NAME, CONFIG_NAME, VOCAB_NAME, TOKENIZER_CONFIG_NAME):
        if (output_dir / name).is_dir():
            raise UserError(f"{output_dir / name}: is a folder where the model's file is to be written")
    if not overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir}: --output_dir is not empty; give another folder, or --overwrite_output_dir "
            f"(with the scripts: OVERWRITE_OUTPUT_DIR=1) to replace the model in it{hint}"
        )


def check_can_make(folder: Path, flag: str) -> None:
    """Checks, and makes nothing, that a folder exists or can be made, and may be written to.

    Raises:
        UserError: a file is in its way, or the user may not write there.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: the folder of {flag} cannot be made ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: the folder of {flag} cannot be written ({existing}: no permission)")


def make_folder(folder: Path, flag: str) -> None:
    """Makes a folder and its parents where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder of {flag} cannot be made ({error.strerror})") from None


def save_model(folder: Path, config: BertConfig, weights: Mapping[str, Tensor], tokenizer: BertTokenizer) -> None:
    """Writes vocab.txt, tokenizer_config.json (the case), config.json and pytorch_model.bin.

    The older ones stay until all are on the disk.

    Raises:
        UserError: a file cannot be written; the older ones are whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = {
            VOCAB_NAME: tokenizer.vocabulary_file,
            TOKENIZER_CONFIG_NAME: tokenizer_config(tokenizer.do_lower_case),
            CONFIG_NAME: config.to_json(),
        }
        write_weights(folder, weights, others)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be saved ({error.strerror or error})") from None
