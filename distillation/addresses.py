"""From addresses in place of folders to the folders themselves, before a run begins.

What is fetched is fetched because a flag named its address; a line tells what, from where and how much.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_processing.downloads.archives import find_folder
from data_processing.downloads.store import Downloads
from distillation.options import Options
from transformer.file_utils import CONFIG_NAME, SAFETENSORS_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)


def fetched(options: Options, ask: bool = True) -> Options:
    """The options with folders in place of all addresses.

    Args:
        options: those of the run.
        ask: whether servers are asked; without it all is there already, since another process has just asked.

    Raises:
        UserError: something cannot be had, or is no model or none of the task's data.
    """
    if not options.addresses:
        return options
    assert options.downloads is not None  # the options' own check
    downloads = Downloads(options.downloads)
    folders: dict[str, Path] = {}
    for name, address in options.addresses.items():
        if ask:
            logger.info("--%s: from %s", name, address.shown)
        content = downloads.get(address, ask)
        if name == "data_dir":
            files = _data_files(options)
            folders[name] = find_folder(content, partial(_has_one, files), address.shown, " or ".join(files))
        else:
            folders[name] = find_folder(content, _has_model, address.shown, f"{CONFIG_NAME} and weights")
    shown = {name: address.shown for name, address in options.addresses.items()}
    return replace(options, **folders, addresses={}, fetched_from=shown)  # type: ignore[arg-type]  # only of these three fields


def _has_model(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and any((folder / n).is_file() for n in (WEIGHTS_NAME, SAFETENSORS_NAME))


def _data_files(options: Options) -> tuple[str, ...]:
    """The files of which a data folder holds at least one."""
    task = options.task
    named = () if options.predict_file is None else (options.predict_file,)
    return (*named, task.train_file, *task.dev_files)


def _has_one(files: tuple[str, ...], folder: Path) -> bool:
    return any((folder / name).is_file() for name in files)
