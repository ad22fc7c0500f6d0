"""Archives from strangers: nothing outside the target, no links, no bombs, whole or not at all."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_processing.downloads.archives import BeyondLimits, Limits, find_folder, is_archive, only_top_folder, unpack
from transformer.errors import UserError

FORMS = ("zip", "tar", "tgz")
OUTSIDE = ["../x", "a/../../x", "/x", "/etc/x", "..", "a/..", "C:/x", "C:x", "..\\x", "a\\..\\..\\x", "\\x"]


def packed(path: Path, entries: dict[str, bytes], form: str) -> Path:
    """An archive of these files, by their names as given."""
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


def with_tar_entry(path: Path, **fields) -> Path:
    """A tar of one good file, and one entry whose header says these things."""
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("good"))
        entry = tarfile.TarInfo("bad")
        for name, value in fields.items():
            setattr(entry, name, value)
        tar.addfile(entry)
    return path


def refusal(path: Path, limits: Limits | None = None) -> str:
    """The message of an archive that is refused; nothing of it is left."""
    before = sorted(path.parent.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        unpack(path, path.parent / "target", limits)
    assert sorted(path.parent.parent.rglob("*")) == before, "something was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def place(tmp_path) -> Path:
    """Where an archive is put, a folder below one that must stay as it is."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_unpacked_as_it_is(place, form):
    files = {"top/a.txt": b"a" * 3_000_000, "top/deep/er/b": b"", "top/Ünïcode 日本.txt": "é".encode(), "./c": b"c"}
    path = packed(place / "whatever.bin", files, form)
    assert is_archive(path)
    unpack(path, place / "target")
    found = {str(p.relative_to(place / "target")): p.read_bytes() for p in (place / "target").rglob("*") if p.is_file()}
    assert found == {name.removeprefix("./"): content for name, content in files.items()}
    assert sorted(p.name for p in place.iterdir()) == ["target", "whatever.bin"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_refuses_the_whole(place, form, name):
    told = refusal(packed(place / "x", {"good": b"good", name: b"bad"}, form))
    assert "leads out of the folder" in told


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("con", "is a device's name on Windows"),
        ("NUL.txt", "is a device's name on Windows"),
        ("a/aux.py", "is a device's name on Windows"),
        ("12:30.log", "is no name for a file on Windows, because of its ':'"),
        ("a/x:y", "is no name for a file on Windows, because of its ':'"),
        ("a\nb", "is no name for a file: it has a control character"),
        ("a\x1b[31m", "is no name for a file: it has a control character"),
        ("x" * 300, "a name in it is too long"),
        ("/".join(["x" * 200] * 6), "a name in it is too long"),
    ],
    ids=lambda text: text[:8],
)
def test_a_name_that_is_none_for_a_file_is_refused_with_the_reason(place, form, name, reason):
    told = refusal(packed(place / "x", {name: b"bad"}, form))
    assert reason in told
    assert "leads out" not in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "'bad' in it is a link to 'good'"),
        (tarfile.LNKTYPE, "'bad' in it is a hard link to 'good' (tar --hard-dereference packs a copy)"),
        (tarfile.CHRTYPE, "is a device, a pipe"),
        (tarfile.BLKTYPE, "is a device, a pipe"),
        (tarfile.FIFOTYPE, "is a device, a pipe"),
        (tarfile.GNUTYPE_SPARSE, "is a file with holes"),
    ],
)
def test_a_tar_of_links_and_devices_is_refused(place, kind, words):
    with_tar_entry(place / "x", type=kind, linkname="good")
    assert words in refusal(place / "x")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_of_links_and_devices_is_refused(place, kind):
    with zipfile.ZipFile(place / "x", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(info, "../../outside")
    words = "is a link;" if kind == stat.S_IFLNK else "is a device, a pipe or a socket;"
    assert words in refusal(place / "x")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "entries",
    [{"a": b"1", "A": b"2"}, {"a": b"1", "a/b": b"2"}, {"a/b": b"1", "A": b"2"}],
    ids=["case", "file", "folder"],
)
def test_two_entries_of_one_name_are_refused(place, form, entries):
    assert "'" in refusal(packed(place / "x", entries, form))


@pytest.mark.parametrize("form", ["zip", "tgz"])
def test_a_bomb_is_refused_before_it_is_unpacked(place, form):
    path = packed(place / "x", {f"{n}": bytes(30_000_000) for n in range(4)}, form)
    assert path.stat().st_size < 1_000_000
    assert "expands to more than 0.105 GB" in refusal(path)
    unpack(path, place / "target", Limits(ratio=10_000))


@pytest.mark.parametrize("form", FORMS)
def test_limits_on_size_and_number_hold(place, form):
    path = packed(place / "x", {f"{n}": b"x" * 1000 for n in range(20)}, form)
    assert "holds more than 19 files" in refusal(path, Limits(entries=19))
    assert "expands to more than 1.9e-05 GB" in refusal(path, Limits(gigabytes=0.000019))
    with pytest.raises(BeyondLimits):
        unpack(path, place / "target", Limits(entries=19))
    unpack(path, place / "target", Limits(entries=20, gigabytes=0.00002))


def test_an_entry_that_lies_about_its_size_is_refused(place):
    """The directory of a zip says 10 bytes, the packed data are ten million."""
    path = packed(place / "x", {"a": bytes(10_000_000)}, "zip")
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        content[(at := content.find(mark)) + offset : at + offset + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    assert "is broken" in refusal(path)


def test_a_tar_whose_name_has_no_end_is_refused(place):
    """A long name is read whole before any entry is seen: ten gigabytes of it, in ten megabytes."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10 * 2**30
    with gzip.open(place / "x", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2**20))
    assert "a name or header in it is too long" in refusal(place / "x")


def test_more_than_the_disk_holds_is_refused(place):
    path = packed(place / "x", {"a": b"x"}, "zip")
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    told = refusal(path, Limits(ratio=1e12))
    assert ("needs 4.29 GB to be unpacked" in told) if free < 2**32 - 2 else ("is broken" in told)


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_archive_is_refused_wherever_it_is_cut(place, form):
    whole = packed(place / "x", {"a": os.urandom(3000), "b": b"b" * 3000}, form).read_bytes()
    # Behind the block of zeros that ends a tar there are more, which no reader needs.
    for length in (0, 1, 5, 100, 300, 600, 1000, 2000, 3000, 3584, 4000, 4608, 5120, 7000, len(whole) - 1):
        if length < (len(whole) if form != "tar" else 7680):
            (place / "x").write_bytes(whole[:length])
            refusal(place / "x")


def test_what_is_no_archive_is_told(place):
    for content in (b"", b"plain text", b"PK", gzip.compress(b"plain text")):
        (place / "x").write_bytes(content)
        assert not is_archive(place / "x")
        assert "is no .zip, .tar, .tar.gz or .tgz file" in refusal(place / "x")


def test_an_encrypted_entry_is_told(place):
    path = packed(place / "x", {"a": b"a"}, "zip")
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


def test_the_one_folder_that_is_meant_is_found(tmp_path):
    (tmp_path / "top" / "model").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "top" / "model").mkdir(parents=True)
    for folder in ("top/model", "__MACOSX/top/model"):
        (tmp_path / folder / "config.json").write_text("{}")
    found = find_folder(tmp_path, lambda folder: (folder / "config.json").is_file(), "it", "config.json")
    assert found == tmp_path / "top" / "model"
    assert only_top_folder(tmp_path) == tmp_path / "top" / "model"
    with pytest.raises(UserError, match=r"it: no folder in it holds train\.tsv; at its top are top"):
        find_folder(tmp_path, lambda folder: (folder / "train.tsv").is_file(), "it", "train.tsv")
    (tmp_path / "top" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"several folders in it hold config\.json"):
        find_folder(tmp_path, lambda folder: (folder / "config.json").is_file(), "it", "config.json")
