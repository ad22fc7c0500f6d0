"""Replace the addresses among a run's options by folders, before the run begins.

Only addresses that a flag names are fetched; the log names source and size.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from data_processing.downloads.archives import MODEL_FILES, find_folder
from distillation.options import Options

logger = logging.getLogger(__name__)


def fetch_addresses(options: Options, refresh: bool = True) -> Options:
    """Return the options with folders in place of all addresses.

    Args:
        options: of the run.
        refresh: whether to look for newer versions; without it all is in the cache, since another process just looked.

    Raises:
        UserError: something cannot be fetched, or holds no model or none of the task's data.
    """
    if not options.addresses:
        return options
    from data_processing.downloads.store import Downloads  # imports requests, which only downloads need

    assert options.downloads is not None  # checked with the options
    downloads = Downloads(options.downloads)
    folders: dict[str, Path] = {}
    for name, address in options.addresses.items():
        if refresh:
            logger.info("--%s: from %s", name, address.redacted)
        files = _data_files(options) if name == "data_dir" else MODEL_FILES
        folders[name] = find_folder(downloads.get(address, refresh), files, address.redacted)
    fetched_from = {name: address.redacted for name, address in options.addresses.items()}
    return replace(options, **folders, addresses={}, fetched_from=fetched_from)  # type: ignore[arg-type]  # only of these three fields


def _data_files(options: Options) -> tuple[tuple[str, ...]]:
    """Return the files of which a data folder holds at least one, for `find_folder`."""
    named = () if options.predict_file is None else (options.predict_file,)
    return ((*named, options.task.train_file, *options.task.dev_files),)
