"""Addresses in place of folders: the flags of both entries, the download command, and an S3 server."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import boto3
import pytest
from cases import ROOT
from moto.server import ThreadedMotoServer
from site_with_faults import Site, breaks_off, falls_silent, says, trickles

import main as main_entry
import task_distill
from data_processing import download
from data_processing.downloads import transports
from data_processing.downloads.addresses import hidden, is_address, parse_address
from data_processing.downloads.store import Downloads
from data_processing.downloads.transfer import Patience
from distillation.addresses import fetched
from distillation.options import parse_options
from transformer.errors import UserError

CONTENT = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http:" + f"//127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def zipped(folder: Path, path: Path, top: str = "top/") -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, top + str(file.relative_to(folder)))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ftp:" + "//127.0.0.1/x.zip", "only http://, https://, s3:// can be fetched"),
        ("file:" + "///etc/passwd", "only http://, https://, s3:// can be fetched"),
        ("http:" + "//", "names no file on a host"),
        ("http:" + "//127.0.0.1", "names no file on a host"),
        ("http:" + "//127.0.0.1:99999/x", "is no address"),
        ("http:" + "//[/x", "is no address"),
        ("http:" + "//127.0.0.1/a b", "names no file on a host"),
        ("http:" + "//127.0.0.1/x?\udc80", "names no file on a host"),
        ("http:" + "//127.0.0.1/x#sha256=12", "expected 64 hexadecimal digits"),
        ("http:" + "//127.0.0.1/x#part", "is not understood"),
    ],
)
def test_what_is_no_address_is_told(text, told):
    assert is_address(text)
    with pytest.raises(UserError) as caught:
        parse_address(text)
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["glue_dir/SST-2", "C:/x", "a:b", ".", "/http/x"])
def test_folders_are_no_addresses(text):
    assert not is_address(text)


@pytest.mark.parametrize(
    "place", ["me:ge/heim@host/x", "me:geheim@host?y@geheim", "me:ge?heim@host/x", "host/x?a=geheim@b"]
)
def test_no_form_of_a_password_is_shown(place):
    shown = hidden(f"--x {'http:'}//{place} --y")
    assert not {"geheim", "heim", "me:"} & {part for part in ("geheim", "heim", "me:") if part in shown}
    assert shown.endswith(" --y")


def test_credentials_are_hidden_and_no_part_of_the_key():
    secret = "https:" + "//me:geheim@127.0.0.1/a/model.zip?v=2&X-Amz-Signature=geheim"
    address = parse_address(secret)
    assert "geheim" not in address.shown + repr(address) + hidden(f"--teacher_model {secret} --x")
    assert address.key == parse_address("https:" + "//127.0.0.1/a/model.zip?v=2").key
    assert address.key != parse_address("https:" + "//127.0.0.1/a/model.zip?v=3").key


SIGNED = [
    "?v=2&X-Amz-Algorithm=A&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=6&X-Amz-SignedHeaders=h&X-Amz-Signature={0}",
    "?v=2&AWSAccessKeyId=a&Expires={0}&Signature={0}",
    "?v=2&sv=1&st={0}&se={0}&sr=b&sp=r&sig={0}",
    "?v=2&Expires={0}&GoogleAccessId=a&Signature={0}",
    "?v=2&Policy={0}&Key-Pair-Id=a&Signature={0}",
    "?v=2&q-sign-algorithm=sha1&q-ak=a&q-sign-time={0}&q-key-time={0}&q-signature={0}",
]


def keys_of(*ends: str) -> set[str]:
    return {parse_address("https:" + "//127.0.0.1/get" + end).key for end in ends}


@pytest.mark.parametrize("signed", SIGNED)
def test_signatures_that_expire_leave_the_key_as_it_is(signed):
    assert keys_of(signed.format(1), signed.format("2%2F")) == keys_of("?v=2")
    assert len(keys_of(signed.format(1), signed.format(1).replace("v=2", "v=3"))) == 2


@pytest.mark.parametrize(
    "name", ["key", "sp", "sv", "se", "auth", "token", "tokenizer", "policy", "expires", "secret", "x-oss-process"]
)
def test_different_addresses_have_different_keys(name):
    ends = [f"?{name}=teacher.zip", f"?{name}=student.zip", "", f"?{name}", f"?{name}=a+b", f"?{name}=a%20b"]
    assert len(keys_of(*ends)) == len(ends)
    assert len(keys_of("?X-Amz-Signature=1&key=a", "?X-Amz-Signature=1&key=b")) == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/model.bin", "model.bin"),
        ("/a/", "a"),
        ("/a%2Fb", "b"),
        ("/%2e%2e", "download"),
        ("/..%5Cx", "_x"),
        ("/%1b[2J", "x1b[2J"),
    ],
)
def test_a_name_from_an_address_is_safe(path, name):
    found = parse_address("http:" + f"//127.0.0.1{path}").name
    assert found.endswith(name)
    assert not set(found) & set("/\\\x1b")


class TestEntries:
    @pytest.fixture
    def flags(self, sst2, site, tmp_path) -> list[str]:
        """Flags of a run whose teacher, student and data are all addresses."""
        places = {
            name: site.put(f"/{name}.zip", zipped(getattr(sst2, folder), tmp_path / "packed"))
            for name, folder in (("teacher_model", "teacher"), ("student_model", "student"), ("data_dir", "data"))
        }
        given = {**places, "cache_dir": tmp_path / "kept", "output_dir": tmp_path / "made", "fps_acc_dir": tmp_path}
        return ["--task_name", "sst-2", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]

    @pytest.mark.parametrize("entry", [main_entry.ENTRY, task_distill.ENTRY], ids=["main", "task_distill"])
    def test_folders_take_the_place_of_addresses(self, flags, entry, tmp_path, site):
        options = parse_options(flags, entry)
        assert not (tmp_path / "kept").exists(), "nothing is fetched before all flags are checked"
        assert site.requests == []
        options = fetched(options)
        assert sorted(path.name for path in options.data_dir.iterdir()) == ["dev.tsv", "train.tsv"]
        for folder in (options.teacher_model, options.student_model):
            assert (folder / "config.json").is_file()
            assert tmp_path / "kept" / "downloads" in folder.parents
        assert not options.addresses
        assert fetched(options) == options

    def test_a_run_trains_from_addresses_in_several_processes(self, flags, tmp_path, site):
        more = ["--max_seq_length", "16", "--num_train_epochs", "1", "--train_batch_size", "4", "--do_lower_case"]
        command = [sys.executable, "main.py", *flags, *more, "--device", "cpu", "--device_list", "0,1", "--performance"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "made" / "pytorch_model.bin").is_file()
        assert sorted(path for path, _ in site.requests) == [
            "/data_dir.zip",
            "/student_model.zip",
            "/teacher_model.zip",
        ]
        told = json.loads((tmp_path / "made" / "run.json").read_text(encoding="utf-8"))["flags"]["fetched_from"]
        assert told == {name: site.address(f"/{name}.zip") for name in ("data_dir", "teacher_model", "student_model")}
        assert f"--teacher_model: from {site.address('/teacher_model.zip')}" in done.stdout

    def test_nothing_is_fetched_for_a_run_that_may_not_write(self, sst2, site):
        sst2.model.mkdir()
        (sst2.model / "mine").write_text("mine")
        assert "--output_dir is not empty" in sst2.fails(teacher_model=site.put("/teacher.zip", b"x"))
        assert site.requests == []

    def test_what_a_server_refuses_is_one_line(self, sst2, site):
        """Only the cache is written, which lies elsewhere."""
        assert "/teacher.zip: the server answers 404" in sst2.fails(teacher_model=site.address("/teacher.zip"))

    def test_what_holds_no_model_is_told(self, flags, site, sst2, tmp_path):
        (sst2.teacher / "config.json").unlink()
        site.put("/teacher_model.zip", zipped(sst2.teacher, tmp_path / "packed"))
        with pytest.raises(UserError, match=r"no folder in it holds config\.json and weights; at its top are top"):
            fetched(parse_options(flags, main_entry.ENTRY))

    def test_without_a_home_the_cache_must_be_named(self, flags, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
        at = flags.index("--cache_dir")
        with pytest.raises(UserError, match="give --cache_dir"):
            parse_options(flags[:at] + flags[at + 2 :], main_entry.ENTRY)

    def test_no_message_shows_credentials(self, flags):
        secret = "http:" + "//me:geheim@127.0.0.1:1/x.zip"
        with pytest.raises(UserError) as caught:
            parse_options([*flags, "--no_such_flag", secret], main_entry.ENTRY)
        assert "geheim" not in str(caught.value)
        options = parse_options([*flags, "--teacher_model", secret], main_entry.ENTRY)
        assert "geheim" not in repr(options)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, site):
        """The command on the archives' names, their addresses being on this machine."""
        for name, archive in list(download.ARCHIVES.items()):
            here = site.address(f"/{name}.zip")
            local = download.Archive(archive.what, here, archive.folder, archive.is_wanted, archive.wanted)
            monkeypatch.setitem(download.ARCHIVES, name, local)
        monkeypatch.chdir(tmp_path)
        return lambda *arguments: download.main(["--cache_dir", str(tmp_path / "kept"), *arguments])

    def test_each_name_goes_where_the_scripts_look(self, run, site, sst2, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        site.put("/sst-2.zip", zipped(sst2.data, tmp_path / "packed"))
        for name in ("student", "teacher-sst-2", "teacher-mnli"):
            site.put(f"/{name}.zip", zipped(sst2.student, tmp_path / "packed", "学生模型/"))
        run("sst-2", "student", "teacher-sst-2", "Teacher-MNLI")
        assert (tmp_path / "glue_dir" / "SST-2" / "train.tsv").read_bytes() == (sst2.data / "train.tsv").read_bytes()
        for name in ("general_tinybert", "bert_base_uncased_ft_sst", "bert_base_uncased_ft_mnli"):
            found = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            assert found == {path.name: path.read_bytes() for path in sst2.student.iterdir()}
        assert f"from {site.address('/student.zip')}, to general_tinybert" in caplog.text
        run("sst-2", "student")
        assert "general_tinybert: is there already" in caplog.text

    def test_what_is_the_users_is_not_written_over_unasked(self, run, site, sst2, tmp_path):
        site.put("/student.zip", zipped(sst2.student, tmp_path / "packed"))
        mine = tmp_path / "general_tinybert" / "mine"
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(UserError, match="general_tinybert: is not empty"):
            run("student")
        assert [path.name for path in mine.parent.iterdir()] == ["mine"]
        run("student", "--overwrite_output_dir")
        assert sorted(path.name for path in mine.parent.iterdir()) == sorted(p.name for p in sst2.student.iterdir())
        assert not list(tmp_path.glob(".general_tinybert*"))

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ((), "name what is to be fetched"),
            (("nothing",), "is neither an address nor one of sst-2"),
            (("student", "STUDENT"), "stands twice"),
            (("student", "sst-2", "--to", "x"), "are for one download"),
            (("http:" + "//me:geheim@127.0.0.1/x.zip",), "give the folder that it goes to"),
            (("student", "--sha256", "12"), "expected 64 hexadecimal digits"),
            (("student", "--most_entries", "0"), "are numbers above 0"),
            (("student", "--most_ratio", "inf"), "are numbers above 0 and below a billion"),
            (("student", "--to", ".", "--overwrite_output_dir"), "no folder to be replaced as a whole"),
            (("student", "--to", "file"), "is a file"),
            (("student", "--to", "file/x"), "is no folder that you may write"),
        ],
    )
    def test_a_mistake_is_told_before_anything_is_fetched(self, run, tmp_path, site, arguments, told):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError) as caught:
            run(*arguments)
        assert told in str(caught.value)
        assert "geheim" not in str(caught.value)
        assert site.requests == []

    def test_a_file_that_is_no_archive_goes_into_its_folder(self, run, site, tmp_path):
        run(site.put("/vectors.txt", CONTENT), "--to", "glove", "--sha256", hashlib.sha256(CONTENT).hexdigest())
        assert (tmp_path / "glove" / "vectors.txt").read_bytes() == CONTENT

    @pytest.mark.parametrize("how", [["data_processing/download.py"], ["-m", "data_processing.download"]])
    def test_it_runs_as_a_script_and_as_a_module(self, site, tmp_path, how):
        site.answers = [says(404)]
        flags = [
            "--cache_dir",
            tmp_path / "kept",
            "--to",
            tmp_path / "x",
            site.address("/\x1b[31m.zip".replace("\x1b", "%1b")),
        ]
        command = [sys.executable, *how, *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the server answers 404" in done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert not (tmp_path / "x").exists()

    def test_the_addresses_are_those_of_the_documents(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert all(archive.address in readme for archive in download.ARCHIVES.values())


class TestS3:
    """moto's server is an S3 over HTTP; the address of the endpoint is AWS's own environment variable."""

    @pytest.fixture
    def client(self, server, monkeypatch):
        for name, value in {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "geheim",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        return client

    @pytest.fixture
    def get(self, tmp_path):
        patience = Patience(connect=2.0, silent=0.5, tries=3, pause=0.01, longest_pause=0.02)

        def get(text: str) -> bytes:
            (file,) = Downloads(tmp_path / "downloads", None, patience).get(parse_address(text)).iterdir()
            return file.read_bytes()

        return get

    def test_an_object_is_fetched_kept_and_fetched_again_when_it_changes(self, client, get, caplog):
        caplog.set_level(logging.INFO)
        client.put_object(Bucket="models", Key="a/model b.bin", Body=CONTENT)
        assert get("s3://models/a/model%20b.bin") == CONTENT
        assert get("s3://models/a/model%20b.bin") == CONTENT
        assert "is there already, and the server has no other" in caplog.text
        client.put_object(Bucket="models", Key="a/model b.bin", Body=CONTENT[::-1])
        assert get("s3://models/a/model%20b.bin") == CONTENT[::-1]

    @pytest.mark.parametrize("changed", [False, True])
    def test_what_broke_off_goes_on_unless_it_has_changed(self, client, get, tmp_path, monkeypatch, changed):
        client.put_object(Bucket="models", Key="model.bin", Body=CONTENT)
        real = transports._s3_pieces
        asked = []

        def breaks(body, exceptions):
            pieces = real(body, exceptions)
            asked.append(next(pieces))
            yield asked[-1]
            if len(asked) == 1:
                if changed:
                    client.put_object(Bucket="models", Key="model.bin", Body=CONTENT[::-1])
                raise transports.Unreachable("the connection broke off")
            yield from pieces

        monkeypatch.setattr(transports, "_s3_pieces", breaks)
        assert get("s3://models/model.bin") == (CONTENT[::-1] if changed else CONTENT)
        assert len(asked) == 2
        assert (asked[1] in (CONTENT[::-1], CONTENT[::-1][: len(asked[1])])) is changed

    @pytest.mark.parametrize("address", ["s3://models/none.bin", "s3://no-such-bucket/none.bin"])
    def test_what_is_not_there_is_told(self, client, get, address):
        with pytest.raises(UserError, match="the server answers 404"):
            get(address)

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            (says(403), "the server answers 403"),
            (says(503), "the server answers 503"),
            (falls_silent(1000), "fell silent"),
            (breaks_off(1000), "broke off"),
            (trickles(b"HTTP/1.1 200 OK\r\nX: ", b"x"), "the server's answer takes longer than 2.5 s"),
            (trickles(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"x"), "fell silent"),
        ],
        ids=["403", "503", "silent", "breaks off", "slow headers", "slow content"],
    )
    def test_a_server_of_s3_that_fails_is_told(self, client, get, site, monkeypatch, answer, told):
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.address(""))
        site.put("/models/model.bin", CONTENT)
        site.answers = [answer] * 10
        with pytest.raises(UserError) as caught:
            get("s3://models/model.bin")
        assert told in str(caught.value)
        assert "geheim" not in str(caught.value)

    def test_without_boto3_it_is_told(self, get, monkeypatch):
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(UserError, match=r"pip install -r requirements-s3\.txt"):
            get("s3://models/model.bin")

    def test_without_credentials_only_what_is_public_is_asked_for(self, client, get, site, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.address(""))
        site.put("/models/model.bin", CONTENT)
        assert get("s3://models/model.bin") == CONTENT
        assert "authorization" not in site.requests[0][1]
