"""data_processing/download.py: names and addresses, the folders they go to, and mistakes."""

import dataclasses
import hashlib
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROOT
from site_with_faults import sends

from data_processing import download
from data_processing.downloads.addresses import parse_address
from transformer.errors import UserError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def run(tmp_path, monkeypatch, site):
    """The command in an empty folder; the named downloads come from a server on this machine."""
    for name, known in list(download.DOWNLOADS.items()):
        local = dataclasses.replace(known, address=parse_address(site.address(f"/{name}.zip")))
        monkeypatch.setitem(download.DOWNLOADS, name, local)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: download.main(["--cache_dir", str(tmp_path / "cache"), *arguments])


def zipped(folder: Path, top: str, place: Path) -> bytes:
    """Packs a folder under another name."""
    shutil.copytree(folder, place / top / top)
    return Path(shutil.make_archive(str(place / top), "zip", place / top)).read_bytes()


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_name_goes_where_the_scripts_expect_it(run, site, sst2, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    site.put("/sst-2.zip", zipped(sst2.data, "data", tmp_path / "packed"))
    student = zipped(sst2.student, "学生模型", tmp_path / "packed")
    for name in ("student", "teacher-sst-2", "teacher-mnli"):
        site.put(f"/{name}.zip", student)
    run("sst-2", "student", "teacher-sst-2", "Teacher-MNLI")
    assert content_of(tmp_path / "glue_dir" / "SST-2") == content_of(sst2.data)
    for name in ("general_tinybert", "bert_base_uncased_ft_sst", "bert_base_uncased_ft_mnli"):
        assert content_of(tmp_path / name) == content_of(sst2.student)
    assert f"from {site.address('/student.zip')}, to general_tinybert" in caplog.text
    run("sst-2", "student")
    assert "general_tinybert: is there already" in caplog.text


def test_other_files_are_replaced_only_on_request(run, site, sst2, tmp_path):
    site.put("/student.zip", zipped(sst2.student, "student", tmp_path / "packed"))
    mine = tmp_path / "general_tinybert" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="general_tinybert: is not empty"):
        run("student")
    assert content_of(mine.parent) == {"mine": b"mine"}
    run("student", "--overwrite_output_dir")
    assert content_of(mine.parent) == content_of(sst2.student)
    assert not list(tmp_path.glob(".general_tinybert*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name what to download"),
        (("nothing",), "neither an address nor one of sst-2"),
        (("student", "STUDENT"), "twice"),
        (("student", "sst-2", "--to", "x"), "for one download"),
        (("http:" + "//me:secret@127.0.0.1/x.zip",), "--output_dir"),
        (("student", "--no_such_flag", "http:" + "//me:secret@127.0.0.1/x.zip"), "--no_such_flag"),
        (("student", "--sha256", "12"), "64 hexadecimal digits"),
        (("student", "--most_entries", "0"), "numbers above 0"),
        (("student", "--most_ratio", "inf"), "numbers above 0"),
        (("student", "--to", ".", "--overwrite_output_dir"), "is refused with --overwrite_output_dir"),
        (("student", "--to", "file"), "is no folder"),
        (("student", "--to", "file/x"), "is no folder"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_fetched(run, tmp_path, site, arguments, reason):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
    assert site.requests == []


def test_a_file_that_is_no_archive_goes_into_its_folder(run, site, tmp_path):
    run(site.put("/vectors.txt", CONTENT), "--to", "glove", "--sha256", hashlib.sha256(CONTENT).hexdigest())
    assert content_of(tmp_path / "glove") == {"vectors.txt": CONTENT}


@pytest.mark.parametrize("how", [["data_processing/download.py"], ["-m", "data_processing.download"]])
def test_the_command_fails_with_one_line_and_status_2(site, tmp_path, how):
    site.answers = [sends(404)]
    flags = ["--cache_dir", tmp_path / "cache", "--to", tmp_path / "x", site.address("/%1b[31m.zip")]
    command = [sys.executable, *how, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "answers 404" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()


def test_the_list_names_the_addresses_of_the_readme(capsys):
    download.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(lines) == len(download.DOWNLOADS)
    assert all(line.rpartition(" from ")[2] in readme for line in lines)
