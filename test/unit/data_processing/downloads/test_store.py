"""The cache of downloads: what is fetched again, what is not, and what is never kept."""

import hashlib
import json
import threading

import pytest
from site_with_faults import breaks_off, etag_of, sends, stalls

from data_processing.downloads.addresses import parse_address
from data_processing.downloads.store import Downloads
from transformer.errors import UserError

CONTENT = bytes(range(256)) * 4000
OTHER = CONTENT[::-1]


def with_sha256(address: str, content: bytes) -> str:
    return f"{address}#sha256={hashlib.sha256(content).hexdigest()}"


def nothing_kept(tmp_path) -> bool:
    return not list(tmp_path.glob("downloads/*/kept.json")) and not list(tmp_path.glob("downloads/*/*/"))


def test_an_unchanged_file_is_fetched_once(site, get, tmp_path):
    address = site.put("/a/model.bin", CONTENT)
    assert get(address) == get(address) == CONTENT
    assert [headers.get("if-none-match") for _, headers in site.requests] == [None, etag_of(CONTENT)]
    assert not list(tmp_path.glob("downloads/*/part*"))


def test_an_unchanged_file_is_not_fetched_from_a_server_that_ignores_conditions(site, get):
    site.answers = [sends(200, len(content), content, Last_Modified="today") for content in (CONTENT, OTHER)]
    address = site.address("/model.bin")
    assert get(address) == get(address) == CONTENT


def test_without_refresh_no_server_is_asked(site, get):
    address = site.put("/model.bin", CONTENT)
    assert get(address, refresh=False) == get(address, refresh=False) == CONTENT
    assert len(site.requests) == 1


def test_a_new_version_is_fetched_and_the_previous_one_stays(site, get, tmp_path):
    """A run may still read it."""
    for content in (CONTENT, OTHER, CONTENT + OTHER):
        assert get(site.put("/model.bin", content)) == content
    kept = {hashlib.sha256(content).hexdigest()[:32] for content in (OTHER, CONTENT + OTHER)}
    assert {path.name for path in tmp_path.glob("downloads/*/*") if path.is_dir()} == kept


@pytest.mark.parametrize("answer", [sends(404), sends(500), stalls()], ids=["404", "500", "stalls"])
def test_the_copy_in_the_cache_is_used_where_the_server_fails_or_is_gone(site, get, caplog, answer):
    address = site.put("/model.bin", CONTENT)
    get(address)
    site.answers = [answer] * 5
    assert get(address) == CONTENT
    site.close()
    assert get(address) == CONTENT
    assert caplog.text.count("the copy in the cache is used") == 2


def test_a_copy_with_the_right_sha256_needs_no_server(site, get):
    address = with_sha256(site.put("/model.bin", CONTENT), CONTENT)
    assert get(address) == get(address) == CONTENT
    assert len(site.requests) == 1


@pytest.mark.parametrize("answer", [sends(200, len(CONTENT), OTHER), sends(200, len(CONTENT) - 1, CONTENT)])
def test_a_file_with_a_wrong_sha256_is_reported_and_not_kept(site, get, refusal, tmp_path, answer):
    address = with_sha256(site.put("/model.bin", CONTENT), CONTENT)
    site.answers = [answer]
    assert f"expected {hashlib.sha256(CONTENT).hexdigest()}" in refusal(address)
    assert nothing_kept(tmp_path)
    assert get(address) == CONTENT


def test_a_corrupted_part_is_dropped_by_its_sha256(site, get, refusal, tmp_path):
    address = with_sha256(site.put("/model.bin", CONTENT), CONTENT)
    site.answers = [breaks_off(5000), *[sends(503)] * 2]
    refusal(address)
    (part,) = tmp_path.glob("downloads/*/part")
    part.write_bytes(b"x" * 5000)
    assert "expected" in refusal(address)
    assert get(address) == CONTENT


def test_a_broken_archive_is_reported_and_not_kept(site, refusal, tmp_path):
    assert "the archive is broken" in refusal(site.put("/model.zip", b"PK\x03\x04" + CONTENT))
    assert nothing_kept(tmp_path)
    assert not list(tmp_path.glob("downloads/*/part"))


def test_threads_that_want_the_same_file_fetch_it_once(site, get):
    address = site.put("/model.bin", CONTENT)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(get(address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert [headers.get("if-none-match") for _, headers in site.requests] == [None, *[etag_of(CONTENT)] * 3]


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"validator": 1}', '{"size": "5"}', "[" * 100_000])
def test_broken_records_count_as_none(site, get, tmp_path, broken):
    address = site.put("/model.bin", CONTENT)
    get(address)
    (entry,) = (tmp_path / "downloads").iterdir()
    for name in ("kept.json", "part.json"):
        (entry / name).write_text(broken)
    (entry / "part").write_bytes(b"x")
    assert get(address) == CONTENT
    assert json.loads((entry / "kept.json").read_text())["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_leftovers_of_a_killed_process_are_removed(site, get, tmp_path):
    address = site.put("/model.bin", CONTENT)
    get(address)
    (entry,) = (tmp_path / "downloads").iterdir()
    (entry / ".unpacking-x").mkdir()
    (entry / "part.0123abcd").write_bytes(b"x")
    assert get(address) == CONTENT
    assert sorted(path.name for path in entry.iterdir() if path.is_file()) == ["kept.json", "lock"]
    assert not (entry / ".unpacking-x").exists()


def test_a_cache_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*file"):
        Downloads(tmp_path / "file").get(parse_address(site.put("/model.bin", CONTENT)))
