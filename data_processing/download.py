"""Command: fetches the data and the models that README names, or what is at any other address.

    python data_processing/download.py sst-2 student teacher-sst-2
    python data_processing/download.py https://host/model.zip#sha256=… --output_dir my_teacher
    python data_processing/download.py --list

Each goes to the folder that the scripts in test/ expect, or to --output_dir. What, from where and how much is told
before it is fetched. A download that broke off goes on when the command is given again; what is there is never written
over unless --overwrite_output_dir says so.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # as a script, from the repository's root or elsewhere
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_processing.cache import default_folder
from data_processing.downloads.addresses import Address, hidden, is_address, parse_address
from data_processing.downloads.archives import Limits, find_folder, only_top_folder
from data_processing.downloads.store import DOWNLOADS, Downloads
from transformer.errors import UserError, one_line, printable

logger = logging.getLogger("data_processing.download")

_MODELS = (
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%E5%AD%A6%E7%94%9F%E6%A8%A1%E5%9E%8B.zip",
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%EF%BC%88%E6%AD%A3%E5%BC%8F%E8%AE%AD%E7%BB%83%EF%BC%89SST-2%E6%95%99%E5%B8%88%E6%A8%A1%E5%9E%8B.zip",
    "https://ascend-pytorch-model-file.obs.cn-north-4.myhuaweicloud.com/%E9%AA%8C%E6%94%B6-%E8%AE%AD%E7%BB%83/nlp/TinyBERT/%E6%A8%A1%E5%9E%8B%E6%96%87%E4%BB%B6/%E3%80%90%E8%AE%AD%E7%BB%83%E3%80%91%EF%BC%88%E8%BF%81%E7%A7%BB%E5%AD%A6%E4%B9%A0%EF%BC%89MNLI%E6%95%99%E5%B8%88%E6%A8%A1%E5%9E%8B.zip",
)
_DATA = "https://ascend-pytorch-one-datasets.obs.cn-north-4.myhuaweicloud.com/train/zip/SST-2-TinyBert.zip"


def has_model(folder: Path) -> bool:
    """Whether a folder holds a model: config.json and weights."""
    weights = ("pytorch_model.bin", "model.safetensors")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def has_data(folder: Path) -> bool:
    """Whether a folder holds a task's files as GLUE names them."""
    return (folder / "train.tsv").is_file()


@dataclass(frozen=True)
class Archive:
    """One of the archives with a name: what it is, where it goes, and which of its folders is meant."""

    what: str
    address: str
    folder: Path
    is_wanted: Callable[[Path], bool]
    wanted: str


_MODEL_FILES = "config.json and weights"
ARCHIVES = {
    "sst-2": Archive("the SST-2 data", _DATA, Path("glue_dir/SST-2"), has_data, "train.tsv"),
    "student": Archive(
        "the generally distilled student", _MODELS[0], Path("general_tinybert"), has_model, _MODEL_FILES
    ),
    "teacher-sst-2": Archive(
        "the teacher fine-tuned on SST-2", _MODELS[1], Path("bert_base_uncased_ft_sst"), has_model, _MODEL_FILES
    ),
    "teacher-mnli": Archive(
        "the teacher fine-tuned on MNLI", _MODELS[2], Path("bert_base_uncased_ft_mnli"), has_model, _MODEL_FILES
    ),
}


@dataclass(frozen=True)
class _Wanted:
    """What the command line asks for: an address, the folder that it goes to, and the name of an archive or None."""

    name: str | None
    address: Address
    target: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{hidden(message)} (see --help)")


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = _Parser(
        prog="data_processing/download.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ARCHIVES)}; or an address")
    parser.add_argument("--list", action="store_true", help="name the archives with their addresses, fetch nothing")
    parser.add_argument(
        "--output_dir", "--to", type=Path, help="where it goes (default: where the scripts in test/ look for it)"
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the folder that it goes to, and all that is in it"
    )
    parser.add_argument("--sha256", help="of the file, in hexadecimal digits; another content is refused")
    parser.add_argument("--cache_dir", type=Path, help="where downloads are kept (default: ~/.cache/tinybert)")
    parser.add_argument(
        "--most_gigabytes",
        type=float,
        default=limits.gigabytes,
        help="of a download and its content (%(default)s)",
    )
    parser.add_argument(
        "--most_ratio", type=float, default=limits.ratio, help="times an archive may expand to its size (%(default)s)"
    )
    parser.add_argument(
        "--most_entries", type=int, default=limits.entries, help="files and folders in an archive (%(default)s)"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Fetches what the command line names.

    Raises:
        UserError: something of it cannot be had, or is there already.
    """
    flags = _parser().parse_args(list(arguments))
    if flags.list:
        for name, archive in ARCHIVES.items():
            print(f"{name}: {archive.what}, to {archive.folder}, from {archive.address}")
        return
    wanted = _wanted(flags)
    cache = flags.cache_dir or default_folder()
    if cache is None:
        raise UserError("there is no home folder to keep downloads in; give --cache_dir")
    if not all(0 < value < 1e9 for value in (flags.most_gigabytes, flags.most_ratio, flags.most_entries)):
        raise UserError("--most_gigabytes, --most_ratio and --most_entries are numbers above 0 and below a billion")
    limits = Limits(flags.most_gigabytes, flags.most_ratio, flags.most_entries)
    for one in wanted:
        _check_target(one.target, flags.overwrite_output_dir, may_be_the_same=True)
    for one in wanted:
        logger.info("%s: from %s, to %s", _what(one), one.address.shown, one.target)
    for one in wanted:
        _fetch(one, Downloads(cache / DOWNLOADS, limits), flags.overwrite_output_dir)


def _what(one: _Wanted) -> str:
    return ARCHIVES[one.name].what if one.name is not None else one.address.name


def _wanted(flags: argparse.Namespace) -> list[_Wanted]:
    if not flags.names:
        raise UserError(f"name what is to be fetched: {', '.join(ARCHIVES)}, or an address (see --help)")
    if len(flags.names) > 1 and (flags.output_dir is not None or flags.sha256 is not None):
        raise UserError("--output_dir and --sha256 are for one download; give the command once for each")
    wanted = []
    for name in flags.names:
        archive = ARCHIVES.get(name.lower())
        if archive is not None:
            address = parse_address(archive.address, flags.sha256)
            wanted.append(_Wanted(name.lower(), address, flags.output_dir or archive.folder))
        elif is_address(name):
            if flags.output_dir is None:
                raise UserError(f"{hidden(name)}: give the folder that it goes to, --output_dir")
            wanted.append(_Wanted(None, parse_address(name, flags.sha256), flags.output_dir))
        else:
            raise UserError(f"{name}: is neither an address nor one of {', '.join(ARCHIVES)}")
    if len({one.target for one in wanted}) < len(wanted):
        raise UserError("one name stands twice")
    return wanted


def _check_target(target: Path, overwrite: bool, may_be_the_same: bool) -> None:
    """Checks, and makes nothing, that a folder may be made or filled. Raises UserError."""
    try:
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: is a file, --output_dir needs a folder")
        existing = next(parent for parent in target.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{target}: cannot be made ({existing} is no folder that you may write)")
        if overwrite and target.resolve() in (Path.cwd(), *Path.cwd().parents, Path.home()):
            raise UserError(f"{target}: is no folder to be replaced as a whole; give another one")
        if not may_be_the_same and not overwrite and target.is_dir() and any(target.iterdir()):
            raise UserError(
                f"{target}: is not empty; give another folder, or --overwrite_output_dir to replace all that is in it"
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target}: cannot be used as --output_dir ({reason})") from None


def _fetch(one: _Wanted, downloads: Downloads, overwrite: bool) -> None:
    content = downloads.get(one.address)
    if one.name is not None:
        archive = ARCHIVES[one.name]
        source = find_folder(content, archive.is_wanted, one.address.shown, archive.wanted)
    else:
        source = only_top_folder(content)
    if _is_same(source, one.target):
        logger.info("%s: is there already", one.target)
        return
    _check_target(one.target, overwrite, may_be_the_same=False)
    try:
        _put(source, one.target)
    except OSError as error:
        raise UserError(f"{one.target}: cannot be written ({error.strerror or error})") from None
    logger.info("%s: done; the download itself stays in %s", one.target, content.parent)


def _is_same(source: Path, target: Path) -> bool:
    """Whether a folder holds every file of another, of the same sizes and times."""
    for path in source.rglob("*"):
        if path.is_dir():
            continue
        try:
            there, here = (target / path.relative_to(source)).stat(), path.stat()
        except OSError:
            return False
        if (there.st_size, there.st_mtime_ns) != (here.st_size, here.st_mtime_ns):
            return False
    return True


def _put(source: Path, target: Path) -> None:
    """Copies a folder to its place, whole or not at all; what was there goes last. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(None, f"it takes {size / 1e9:.3g} GB, there are {free / 1e9:.3g} GB free")
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(source, beside / "new")
        for path in (beside / "new").rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if target.exists():
            os.rename(target, beside / "old")
        try:
            os.rename(beside / "new", target)
        except OSError:
            if (beside / "old").exists():
                os.rename(beside / "old", target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


def run() -> int:
    """The command: its exit status is 2, after one line, where the user's mistake or a server ended it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"data_processing/download.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(one_line("stopped; the same command goes on where it was"), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
