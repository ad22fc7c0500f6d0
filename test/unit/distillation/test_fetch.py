"""Addresses in place of folders: the flags of both entries, and runs that fetch their models and data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROOT

import main as main_entry
import task_distill
from distillation.fetch import fetch_addresses
from distillation.options import parse_options
from transformer.errors import UserError

NAMES = {"teacher_model": "teacher", "student_model": "student", "data_dir": "data"}


def zipped(folder: Path) -> bytes:
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name)).read_bytes()


@pytest.fixture
def flags(sst2, site, tmp_path) -> list[str]:
    """The flags of a run whose teacher, student and data are all addresses."""
    places = {name: site.put(f"/{name}.zip", zipped(getattr(sst2, folder))) for name, folder in NAMES.items()}
    given = {**places, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "made", "fps_acc_dir": tmp_path}
    return ["--task_name", "sst-2", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


@pytest.mark.parametrize("entry", [main_entry.ENTRY, task_distill.ENTRY], ids=["main", "task_distill"])
def test_folders_replace_addresses(flags, entry, tmp_path, site):
    options = parse_options(flags, entry)
    assert site.requests == [], "all flags are checked before anything is fetched"
    options = fetch_addresses(options)
    assert sorted(path.name for path in options.data_dir.iterdir()) == ["dev.tsv", "train.tsv"]
    for folder in (options.teacher_model, options.student_model):
        assert (folder / "config.json").is_file()
        assert tmp_path / "cache" / "downloads" in folder.parents
    assert not options.addresses
    assert fetch_addresses(options) == options


def test_several_processes_train_from_addresses(flags, tmp_path, site):
    more = ["--max_seq_length", "16", "--num_train_epochs", "1", "--train_batch_size", "4", "--do_lower_case"]
    command = [sys.executable, "main.py", *flags, *more, "--device", "cpu", "--device_list", "0,1", "--performance"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made" / "pytorch_model.bin").is_file()
    assert sorted(path for path, _ in site.requests) == sorted(f"/{name}.zip" for name in NAMES)
    record = json.loads((tmp_path / "made" / "run.json").read_text(encoding="utf-8"))
    assert record["flags"]["fetched_from"] == {name: site.address(f"/{name}.zip") for name in NAMES}
    assert f"--teacher_model: from {site.address('/teacher_model.zip')}" in done.stdout


def test_nothing_is_fetched_for_a_run_that_may_not_write(sst2, site):
    sst2.model.mkdir()
    (sst2.model / "mine").write_text("mine")
    assert "--output_dir is not empty" in sst2.fails(teacher_model=site.put("/teacher.zip", b"x"))
    assert site.requests == []


def test_a_missing_file_is_reported_in_one_line(sst2, site):
    assert "/teacher.zip: the server answers 404" in sst2.fails(teacher_model=site.address("/teacher.zip"))


def test_an_archive_without_a_model_is_reported(flags, site, sst2):
    (sst2.teacher / "config.json").unlink()
    site.put("/teacher_model.zip", zipped(sst2.teacher))
    with pytest.raises(UserError, match=r"holds config\.json and pytorch_model\.bin or model\.safetensors"):
        fetch_addresses(parse_options(flags, main_entry.ENTRY))


def test_without_a_home_folder_cache_dir_is_required(flags, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    at = flags.index("--cache_dir")
    with pytest.raises(UserError, match="--cache_dir"):
        parse_options(flags[:at] + flags[at + 2 :], main_entry.ENTRY)


def test_credentials_are_shown_neither_in_messages_nor_in_options(flags):
    address = "http:" + "//me:secret@127.0.0.1:1/x.zip"
    with pytest.raises(UserError) as caught:
        parse_options([*flags, "--no_such_flag", address], main_entry.ENTRY)
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(parse_options([*flags, "--teacher_model", address], main_entry.ENTRY))
