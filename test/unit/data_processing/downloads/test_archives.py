"""Archives from untrusted sources: nothing outside the target, no links, no bombs, all or nothing."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_processing.downloads.archives import (
    MODEL_FILES,
    BeyondLimits,
    Limits,
    find_folder,
    is_archive,
    only_top_folder,
    unpack,
)
from transformer.errors import UserError

FORMS = ("zip", "tar", "tgz")
OUTSIDE = ["../x", "a/../../x", "/x", "/etc/x", "..", "a/..", "C:/x", "C:x", "..\\x", "a\\..\\..\\x", "\\x"]


def packed(path: Path, entries: dict[str, bytes], form: str) -> Path:
    """Packs files under these names, as they are given."""
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                info = zipfile.ZipInfo("x")
                info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED
                archive.writestr(info, content)
        return path
    with tarfile.open(path, "w:gz" if form == "tgz" else "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in entries.items():
            tar_info = tarfile.TarInfo(name)
            tar_info.size = len(content)
            tar.addfile(tar_info, io.BytesIO(content))
    return path


def refusal(path: Path, limits: Limits | None = None) -> str:
    """Returns the message of an archive that is refused; nothing of it is left."""
    before = sorted(path.parent.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        unpack(path, path.parent / "target", limits)
    assert sorted(path.parent.parent.rglob("*")) == before, "something was left behind"
    return str(caught.value)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder for the archive; the one above it must stay as it is."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_unpacked_completely(place, form):
    files = {"top/a.txt": b"a" * 3_000_000, "top/deep/er/b": b"", "top/Ünïcode 日本.txt": "é".encode(), "c\\d": b"c"}
    path = packed(place / "whatever.bin", files, form)
    assert is_archive(path)
    unpack(path, place / "target")
    assert content_of(place / "target") == {name.replace("\\", "/"): content for name, content in files.items()}
    assert sorted(p.name for p in place.iterdir()) == ["target", "whatever.bin"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*OUTSIDE, "x" * 1200])
def test_a_name_outside_the_target_refuses_the_archive(place, form, name):
    assert "out of the target folder" in refusal(packed(place / "x", {"good": b"good", name: b"bad"}, form))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_a_tar_with_a_link_or_a_device_is_refused(place, kind):
    with tarfile.open(place / "x", "w") as tar:
        tar.addfile(tarfile.TarInfo("good"))
        entry = tarfile.TarInfo("bad")
        entry.type, entry.linkname = kind, "good"
        tar.addfile(entry)
    assert "'bad' in it is a link" in refusal(place / "x")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_with_a_link_or_a_device_is_refused(place, kind):
    with zipfile.ZipFile(place / "x", "w") as archive:
        info = zipfile.ZipInfo("bad")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(info, "../../outside")
    assert "'bad' in it is a link" in refusal(place / "x")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_also_a_folder_is_refused(place, form):
    refusal(packed(place / "x", {"a": b"1", "a/b": b"2"}, form))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", FORMS)
def test_two_files_of_one_name_are_refused(place, form):
    path = packed(place / "x", {"a": b"1", "./a": b"2"}, form)
    assert "File exists" in refusal(path)


@pytest.mark.parametrize("form", ["zip", "tgz"])
def test_a_bomb_is_refused_before_it_is_unpacked(place, form):
    path = packed(place / "x", {f"{n}": bytes(30_000_000) for n in range(4)}, form)
    assert path.stat().st_size < 1_000_000
    assert "--most_ratio" in refusal(path)
    unpack(path, place / "target", Limits(ratio=10_000))


@pytest.mark.parametrize("form", FORMS)
def test_limits_on_size_and_number_hold(place, form):
    path = packed(place / "x", {f"{n}": b"x" * 1000 for n in range(20)}, form)
    assert "--most_entries" in refusal(path, Limits(entries=19))
    assert "--most_gigabytes" in refusal(path, Limits(gigabytes=0.000019))
    with pytest.raises(BeyondLimits):
        unpack(path, place / "target", Limits(entries=19))
    unpack(path, place / "target", Limits(entries=20, gigabytes=0.00002))


def test_an_entry_with_a_false_size_is_refused(place):
    """The directory of the zip states 10 bytes, the packed data are ten million."""
    path = packed(place / "x", {"a": bytes(10_000_000)}, "zip")
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        content[(at := content.find(mark)) + offset : at + offset + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    assert "is broken" in refusal(path)


def test_a_tar_with_an_endless_name_is_refused(place):
    """tarfile reads a long name as a whole, before it returns an entry: ten gigabytes, in ten megabytes."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10 * 2**30
    with gzip.open(place / "x", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2**20))
    assert "too long" in refusal(place / "x")


def test_content_larger_than_the_disk_is_refused(place):
    path = packed(place / "x", {"a": b"x"}, "zip")
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    assert ("needs 4.29 GB" if free < 2**32 - 2 else "is broken") in refusal(path, Limits(ratio=1e12))


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_archive_is_refused(place, form):
    whole = packed(place / "x", {"a": os.urandom(3000), "b": b"b" * 3000}, form).read_bytes()
    # The block of zeros that ends a tar is followed by more of them, which no reader needs.
    for length in (0, 1, 5, 100, 300, 600, 1000, 2000, 3000, 3584, 4000, 4608, 5120, 7000, len(whole) - 1):
        if length < (len(whole) if form != "tar" else 7680):
            (place / "x").write_bytes(whole[:length])
            refusal(place / "x")


def test_a_corrupted_archive_is_refused(place):
    path = packed(place / "x", {"a": b"a" * 3000, "b": b"b" * 3000}, "tar")
    content = bytearray(path.read_bytes())
    content[content.find(b"b" * 3000) - 512] ^= 1  # in the second header, which is then taken for the end
    path.write_bytes(content)
    assert "is broken" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"plain text", b"PK", gzip.compress(b"plain text", mtime=0)],
    ids=["empty", "text", "short", "gzip"],
)
def test_another_kind_of_file_is_no_archive(place, content):
    (place / "x").write_bytes(content)
    assert not is_archive(place / "x")
    assert "is no .zip, .tar, .tar.gz or .tgz file" in refusal(place / "x")


def test_an_encrypted_entry_is_refused(place):
    path = packed(place / "x", {"a": b"a"}, "zip")
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


def test_the_folder_with_the_wanted_files_is_found(tmp_path):
    for folder in ("top/model", "__MACOSX/top/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_text("")
    assert find_folder(tmp_path, MODEL_FILES, "it") == only_top_folder(tmp_path) == tmp_path / "top" / "model"
    with pytest.raises(UserError, match=r"it: no folder in it holds train\.tsv; at its top are top"):
        find_folder(tmp_path, (("train.tsv",),), "it")
    (tmp_path / "top" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"several folders in it hold config\.json"):
        find_folder(tmp_path, (("config.json",),), "it")
