"""Command: download data and models, by name or by address.

    python data_processing/download.py sst-2 student teacher-sst-2
    python data_processing/download.py https://host/model.zip#sha256=… --output_dir my_teacher
    python data_processing/download.py --list

Each goes to the folder where the scripts in test/ expect it, or to --output_dir. The log names source and size.
The same command resumes a download that broke off. --overwrite_output_dir replaces a folder that holds other files.
"""

from __future__ import annotations

import argparse
import filecmp
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # as a script, from the repository's root or elsewhere
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_processing.cache import default_folder
from data_processing.downloads.addresses import Address, is_address, parse_address, redact
from data_processing.downloads.archives import MODEL_FILES, Limits, find_folder, only_top_folder
from data_processing.downloads.store import Downloads
from distillation.flags import path as path_of
from distillation.runtime.console import show_messages
from transformer.errors import UserError, one_line

logger = logging.getLogger("data_processing.download")

_MODELS = (
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%E5%AD%A6%E7%94%9F%E6%A8%A1%E5%9E%8B.zip",
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%EF%BC%88%E6%AD%A3%E5%BC%8F%E8%AE%AD%E7%BB%83%EF%BC%89SST-2%E6%95%99%E5%B8%88%E6%A8%A1%E5%9E%8B.zip",
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%EF%BC%88%E8%BF%81%E7%A7%BB%E5%AD%A6%E4%B9%A0%EF%BC%89MNLI%E6%95%99%E5%B8%88%E6%A8%A1%E5%9E%8B.zip",
)
_DATA = "https://ascend-pytorch-one-datasets.obs.cn-north-4.myhuaweicloud.com/train/zip/SST-2-TinyBert.zip"


@dataclass(frozen=True)
class Download:
    """Something to download.

    what: its description. address: where it is. folder: where it goes. files: what its folder in the archive holds, for
    `find_folder`; without any it is all that the archive holds.
    """

    what: str
    address: Address
    folder: Path
    files: Sequence[Sequence[str]] = ()


DOWNLOADS = {
    "sst-2": Download("the SST-2 data", parse_address(_DATA), Path("glue_dir/SST-2"), (("train.tsv",),)),
    "student": Download(
        "the generally distilled student", parse_address(_MODELS[0]), Path("general_tinybert"), MODEL_FILES
    ),
    "teacher-sst-2": Download(
        "the teacher fine-tuned on SST-2", parse_address(_MODELS[1]), Path("bert_base_uncased_ft_sst"), MODEL_FILES
    ),
    "teacher-mnli": Download(
        "the teacher fine-tuned on MNLI", parse_address(_MODELS[2]), Path("bert_base_uncased_ft_mnli"), MODEL_FILES
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{redact(message)} (see --help)")


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    limits = Limits()
    parser = _Parser(
        prog="data_processing/download.py", description=(__doc__ or "TinyBERT").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(DOWNLOADS)}; or an address")
    parser.add_argument(
        "--list", action="store_true", help="print the names with their addresses, and download nothing"
    )
    parser.add_argument(
        "--output_dir",
        "--to",
        type=path_of,
        help="the folder to create (default: where the scripts in test/ expect it)",
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace that folder with all files in it")
    parser.add_argument("--sha256", help="of the downloaded file, in hexadecimal digits; any other file is refused")
    parser.add_argument("--cache_dir", type=path_of, help="the cache folder of downloads (default: ~/.cache/tinybert)")
    for name, default, what in (
        ("--most_gigabytes", limits.gigabytes, "a download and its content"),
        ("--most_ratio", limits.ratio, "the size of an archive's content to its own"),
        ("--most_entries", limits.entries, "files and folders in an archive"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=f"limit on {what} (%(default)s)")
    flags = parser.parse_args(list(arguments))
    if not all(0 < value < 1e9 for value in (flags.most_gigabytes, flags.most_ratio, flags.most_entries)):
        raise UserError("--most_gigabytes, --most_ratio and --most_entries are numbers above 0 and below a billion")
    return flags


def main(arguments: Sequence[str]) -> None:
    """Download what the command line names.

    Raises:
        UserError: something cannot be downloaded, or its folder holds other files already.
    """
    flags = _parse_flags(arguments)
    if flags.list:
        for name, known in DOWNLOADS.items():
            print(f"{name}: {known.what}, to {known.folder}, from {known.address.url}")
        return
    cache = flags.cache_dir or default_folder()
    if cache is None:
        raise UserError("there is no home folder for the cache; give --cache_dir")
    wanted = _wanted(flags)
    for download in wanted:
        _check_folder(download.folder, flags.overwrite_output_dir)
        logger.info("%s: from %s, to %s", download.what, download.address.redacted, download.folder)
    downloads = Downloads(cache, Limits(flags.most_gigabytes, flags.most_ratio, flags.most_entries))
    for download in wanted:
        content = downloads.get(download.address)
        redacted = download.address.redacted
        source = find_folder(content, download.files, redacted) if download.files else only_top_folder(content)
        if _is_copied(source, download.folder):
            logger.info("%s: is there already", download.folder)
            continue
        try:
            _copy_folder(source, download.folder, flags.overwrite_output_dir)
        except OSError as error:
            raise UserError(f"{download.folder}: cannot be written ({error.strerror or error})") from None
        logger.info("%s: done; the download stays in %s", download.folder, content.parent)


def _wanted(flags: argparse.Namespace) -> list[Download]:
    if not flags.names:
        raise UserError(f"name what to download: {', '.join(DOWNLOADS)}, or an address (see --help)")
    if len(flags.names) > 1 and (flags.output_dir is not None or flags.sha256 is not None):
        raise UserError("--output_dir and --sha256 are for one download; give the command once for each")
    wanted = []
    for name in flags.names:
        if name.lower() in DOWNLOADS:
            known = DOWNLOADS[name.lower()]
            address = parse_address(known.address.url, flags.sha256)
            wanted.append(replace(known, address=address, folder=flags.output_dir or known.folder))
        elif not is_address(name):
            raise UserError(f"{name}: is neither an address nor one of {', '.join(DOWNLOADS)}")
        elif flags.output_dir is None:
            raise UserError(f"{redact(name)}: give --output_dir, the folder to create")
        else:
            address = parse_address(name, flags.sha256)
            wanted.append(Download(address.name, address, flags.output_dir))
    if len({download.folder for download in wanted}) < len(wanted):
        raise UserError("one name is given twice")
    return wanted


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Check that a folder can be created or filled, before anything is downloaded. Raises UserError."""
    try:
        place = folder.absolute().parent if folder.is_dir() else folder.absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{folder}: cannot be created; {existing} is no folder, or not writable")
        if overwrite and folder.resolve() in (Path.cwd(), *Path.cwd().parents, Path.home()):
            raise UserError(f"{folder}: is refused with --overwrite_output_dir; give another folder")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be used as --output_dir ({reason})") from None


def _is_copied(source: Path, target: Path) -> bool:
    """Return whether a folder holds every file of another, with the same sizes and times."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file() and not (
            copy.is_file() and filecmp.cmp(path, copy)
        ):  # reads the contents only where the times differ
            return False
    return True


def _copy_folder(source: Path, target: Path, overwrite: bool) -> None:
    """Copy a folder, completely or not at all; an existing one is removed last. Raises OSError, UserError."""
    if not overwrite and target.is_dir() and any(target.iterdir()):
        advice = "give another folder, or --overwrite_output_dir to replace all that is in it"
        raise UserError(f"{target}: is not empty; {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(source, beside / "new")
        if target.exists():
            os.rename(target, beside / "old")
        os.rename(beside / "new", target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def run() -> int:
    """Run the command; return its exit status: 2, after one line, for a mistake of the user or a failing server."""
    show_messages()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"data_processing/download.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(one_line("stopped; the same command resumes"), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
