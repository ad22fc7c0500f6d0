"""Downloads over real sockets: servers that break off, fall silent, lie, send elsewhere or refuse."""

import hashlib
import json
import logging
import threading

import pytest
from site_with_faults import Site, breaks_off, etag_of, falls_silent, in_chunks, says, says_nothing, trickles, well

from data_processing.downloads.addresses import parse_address
from data_processing.downloads.archives import Limits
from data_processing.downloads.store import Downloads
from data_processing.downloads.transfer import Patience
from transformer.errors import UserError

CONTENT = bytes(range(256)) * 8000  # some 2 MB: several pieces
OTHER = CONTENT[::-1]
QUICK = Patience(connect=1.0, silent=0.3, tries=3, pause=0.01, longest_pause=0.02, longest_asked=2.0)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def get(tmp_path):
    """Fetches an address into a cache; returns the file's content."""

    def get(text: str, limits: Limits | None = None, **settings) -> bytes:
        folder = Downloads(tmp_path / "downloads", limits, QUICK).get(parse_address(text), **settings)
        (file,) = folder.iterdir()
        return file.read_bytes()

    return get


def refused(get, text: str, **settings) -> str:
    with pytest.raises(UserError) as caught:
        get(text, **settings)
    return str(caught.value)


def ranges(site: Site) -> list[str | None]:
    return [headers.get("range") for _, headers in site.requests]


def nothing_kept(tmp_path) -> bool:
    return not list((tmp_path / "downloads").glob("*/kept.json")) and not list((tmp_path / "downloads").glob("*/*/"))


def test_a_file_is_fetched_once(site, get, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    address = site.put("/a/model.bin", CONTENT)
    assert get(address) == CONTENT
    assert "2.0 MB" in caplog.text
    assert address in caplog.text
    assert get(address) == CONTENT
    assert site.requests[1][1]["if-none-match"] == etag_of(CONTENT)
    assert len(site.requests) == 2
    (entry,) = (tmp_path / "downloads").iterdir()
    assert not (entry / "part").exists()


def test_another_version_takes_the_place_and_the_one_before_stays_for_who_reads_it(site, get, tmp_path):
    address = site.put("/model.bin", CONTENT)
    for content in (CONTENT, OTHER, CONTENT + OTHER):
        site.files["/model.bin"] = content
        assert get(address) == content
    (entry,) = (tmp_path / "downloads").iterdir()
    kept = {hashlib.sha256(content).hexdigest()[:32] for content in (OTHER, CONTENT + OTHER)}
    assert {path.name for path in entry.iterdir() if path.is_dir()} == kept


@pytest.mark.parametrize("after", [1, 1000, len(CONTENT) - 1])
def test_what_broke_off_goes_on_where_it_was(site, get, after):
    site.answers = [breaks_off(after)]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, f"bytes={after}-"]
    assert site.requests[1][1]["if-range"] == etag_of(CONTENT)


def test_a_later_command_goes_on_too(site, get):
    site.answers = [breaks_off(5000), *[says(503)] * 2]
    address = site.put("/model.bin", CONTENT)
    assert "the server answers 503" in refused(get, address)
    assert get(address) == CONTENT
    assert ranges(site)[-1] == "bytes=5000-"


def test_what_is_whole_is_not_asked_for_again(site, get, tmp_path):
    """A process may be killed after the last byte."""
    site.answers = [breaks_off(5000), *[says(503)] * 2]
    address = site.put("/model.bin", CONTENT)
    refused(get, address)
    (part,) = (tmp_path / "downloads").glob("*/part")
    part.write_bytes(CONTENT)
    before = len(site.requests)
    assert get(address) == CONTENT
    assert len(site.requests) == before


def test_a_server_that_knows_no_ranges_sends_all_again(site, get):
    whole = says(200, len(CONTENT), CONTENT, ETag=etag_of(CONTENT))
    site.answers = [breaks_off(1000), whole]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, "bytes=1000-"]


def test_a_server_without_etag_or_date_is_asked_for_all(site, get):
    site.answers = [says(200, len(CONTENT), CONTENT[:1000])]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, None]


def test_another_version_meanwhile_begins_anew(site, get):
    def changes(handler):
        site.files["/model.bin"] = OTHER
        well(handler)

    site.answers = [breaks_off(1000), changes]
    assert get(site.put("/model.bin", CONTENT)) == OTHER
    assert ranges(site) == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("begin", "total", "etag"),
    [
        (1000, len(OTHER), etag_of(OTHER)),
        (999, len(CONTENT), etag_of(CONTENT)),
        (1000, len(CONTENT) + 1, etag_of(CONTENT)),
    ],
    ids=["of another version", "from elsewhere", "of another length"],
)
def test_a_part_that_does_not_fit_is_not_joined(site, get, begin, total, etag):
    part = OTHER[1000:]
    wrong = says(206, len(part), part, ETag=etag, Content_Range=f"bytes {begin}-{total - 1}/{total}")
    site.answers = [breaks_off(1000), wrong]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, "bytes=1000-", None]


@pytest.mark.parametrize("status", [416, 412])
def test_a_refused_range_begins_anew(site, get, status):
    site.answers = [breaks_off(1000), says(status)]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, "bytes=1000-", None]


def test_silence_is_noticed(site, get):
    site.answers = [falls_silent(1000)]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, "bytes=1000-"]


def test_silence_without_end_is_told(site, get, tmp_path):
    site.answers = [falls_silent(0)] * 3
    assert refused(get, site.put("/model.bin", CONTENT)).endswith("cannot be fetched: the server fell silent")
    assert nothing_kept(tmp_path)


HEAD = f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n".encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "without_end"),
    [
        (b"", b"H"),
        (HEAD + b"X: ", b"x"),
        (HEAD + b"\r\n", b"x"),
        (CHUNKED + b"5;", b"x"),
        (b"HTTP/1.1 302 Found\r\nLocation: ", b"/"),
    ],
    ids=["status", "headers", "content", "a chunk's line", "a redirection"],
)
def test_a_trickle_is_as_good_as_silence(site, get, before, without_end):
    """Wherever in the answer: no single wait is long, all together are."""
    site.answers = [trickles(before, without_end)]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert len(site.requests) == 2
    assert site.outwaited == 0


def test_a_trickle_without_end_is_told(site, get, tmp_path):
    site.answers = [trickles(HEAD + b"X: ", b"x")] * 3
    told = refused(get, site.put("/model.bin", CONTENT))
    assert told.endswith("cannot be fetched: the server's answer takes longer than 1.3 s")
    assert nothing_kept(tmp_path)


def test_a_length_that_is_too_long_is_a_broken_connection(site, get, tmp_path):
    site.answers = [says(200, len(CONTENT) + 100, CONTENT, ETag='"a"')] * 3
    assert refused(get, site.put("/model.bin", CONTENT)).endswith("cannot be fetched: the connection broke off")
    assert nothing_kept(tmp_path)


def test_a_length_that_is_too_short_is_found_by_the_sha256(site, get, tmp_path):
    address = site.put("/model.bin", CONTENT) + f"#sha256={hashlib.sha256(CONTENT).hexdigest()}"
    site.answers = [says(200, len(CONTENT) - 100, CONTENT, ETag='"a"')]
    assert f"expected {hashlib.sha256(CONTENT).hexdigest()}" in refused(get, address)
    assert nothing_kept(tmp_path)
    assert get(address) == CONTENT


def test_without_a_length_the_end_is_the_servers_word(site, get):
    site.answers = [in_chunks()]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert len(site.requests) == 1


def test_without_a_length_a_missing_end_is_noticed(site, get):
    site.answers = [in_chunks(ends=False)]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert ranges(site) == [None, f"bytes={len(CONTENT) // 2}-"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(site, get, status):
    site.answers = [says(status)] * 2
    assert get(site.put("/model.bin", CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "password"), (403, "credentials"), (404, "no such file"), (410, "no longer"), (418, "418")],
)
def test_what_will_not_pass_is_told_at_once(site, get, tmp_path, status, hint):
    site.answers = [says(status)]
    told = refused(get, site.put("/model.bin", CONTENT))
    assert f"the server answers {status}" in told
    assert hint in told
    assert len(site.requests) == 1
    assert nothing_kept(tmp_path)


def test_a_server_is_left_alone_as_long_as_it_asks(site, get, caplog):
    caplog.set_level(logging.INFO)
    site.answers = [says(429, Retry_After="1")]
    assert get(site.put("/model.bin", CONTENT)) == CONTENT
    assert "the server answers 429; another try in 1 s" in caplog.text


def test_a_server_that_asks_for_too_long_is_told(site, get):
    site.answers = [says(503, Retry_After="86400")]
    assert "asks to come back in 86400 s" in refused(get, site.put("/model.bin", CONTENT))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_range(site, get, status):
    site.put("/there.bin", CONTENT)
    here = says(status, Location="/there.bin")
    site.answers = [here, breaks_off(1000), here]
    assert get(site.address("/model.bin")) == CONTENT
    assert [path for path, _ in site.requests] == ["/model.bin", "/there.bin"] * 2
    assert ranges(site)[-1] == "bytes=1000-"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/model.bin", "more than 5 times"),
        ("file:///etc/passwd", "no http address"),
        ("ftp://127.0.0.1/x", "no http address"),
        ("http://[", "is none"),
        ("http://", "more than 5 times"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_told(site, get, tmp_path, target, told):
    site.answers = [says(302, Location=target)] * 10
    assert told in refused(get, site.address("/model.bin"))
    assert nothing_kept(tmp_path)


def test_credentials_are_sent_to_their_server_alone_and_shown_nowhere(site, get, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    other = Site()
    try:
        other.put("/there.bin", CONTENT)
        site.answers = [says(302, Location=other.address("/there.bin?token=geheim3"))]
        address = site.address("/model.bin?token=geheim2").replace("//", "//someone:geheim1@")
        assert get(address) == CONTENT
        assert site.requests[0][1]["authorization"].startswith("Basic ")
        assert site.requests[0][0] == "/model.bin?token=geheim2"
        assert "authorization" not in other.requests[0][1]
        site.answers = [says(403)]
        assert get(address) == CONTENT  # what is there stays
        written = "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*.json")) + "".join(
            str(path) for path in tmp_path.rglob("*")
        )
        assert "geheim" not in caplog.text + written
        assert "someone" not in caplog.text + written
    finally:
        other.close()


@pytest.mark.parametrize("answer", [says(404), says(500), says_nothing], ids=["404", "500", "silence"])
def test_a_copy_that_is_there_is_used_where_the_server_fails(site, get, caplog, answer):
    address = site.put("/model.bin", CONTENT)
    assert get(address) == CONTENT
    site.answers = [answer] * 5
    assert get(address) == CONTENT
    assert "the copy that is there is used" in caplog.text


def test_a_copy_that_is_there_is_used_without_a_network(site, get, caplog):
    address = site.put("/model.bin", CONTENT)
    assert get(address) == CONTENT
    site.close()
    assert get(address) == CONTENT
    assert "refuses connections; the copy that is there is used" in caplog.text


def test_without_a_network_and_a_copy_it_is_told(site, get):
    site.close()
    assert "cannot be fetched: the server refuses connections" in refused(get, site.address("/model.bin"))


def test_a_copy_of_the_right_sha256_needs_no_server(site, get):
    address = site.put("/model.bin", CONTENT) + f"#sha256={hashlib.sha256(CONTENT).hexdigest()}"
    assert get(address) == CONTENT
    assert get(address) == CONTENT
    assert len(site.requests) == 1


def test_a_wrong_sha256_is_told_and_nothing_is_kept(site, get, tmp_path):
    told = refused(get, site.put("/model.bin", CONTENT) + "#sha256=" + "0" * 64)
    assert hashlib.sha256(CONTENT).hexdigest() in told
    assert nothing_kept(tmp_path)
    assert len(site.requests) == 1


def test_a_wrong_sha256_of_what_was_put_together_is_tried_anew_once(site, get, tmp_path):
    address = site.put("/model.bin", CONTENT)
    site.answers = [breaks_off(5000), *[says(503)] * 2]
    refused(get, address)
    (part,) = (tmp_path / "downloads").glob("*/part")
    part.write_bytes(b"x" * 5000)
    assert get(f"{address}#sha256={hashlib.sha256(CONTENT).hexdigest()}") == CONTENT


def test_more_than_is_allowed_is_refused_before_it_is_fetched(site, get, tmp_path):
    limits = Limits(gigabytes=0.001)
    assert "--most_gigabytes" in refused(get, site.put("/model.bin", CONTENT), limits=limits)
    site.answers = [in_chunks()]
    assert nothing_kept(tmp_path)


def test_more_than_the_disk_holds_is_refused_before_it_is_fetched(site, get):
    site.answers = [says(200, 10**15, b"x", ETag='"a"')]
    assert "needs 1e+06 GB" in refused(get, site.address("/model.bin"), limits=Limits(gigabytes=1e9))


def test_another_encoding_is_refused(site, get):
    site.answers = [says(200, 3, b"abc", Content_Encoding="gzip")]
    assert "another encoding ('gzip')" in refused(get, site.address("/model.bin"))


def test_who_wants_the_same_at_the_same_time_fetches_it_once(site, get):
    address = site.put("/model.bin", CONTENT)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(get(address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert [headers.get("if-none-match") for _, headers in site.requests] == [None, *[etag_of(CONTENT)] * 3]


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"version": 1}', '{"etag": 5}', "[" * 100_000])
def test_records_that_are_broken_count_as_none(site, get, tmp_path, broken):
    address = site.put("/model.bin", CONTENT)
    assert get(address) == CONTENT
    (entry,) = (tmp_path / "downloads").iterdir()
    for name in ("kept.json", "part.json"):
        (entry / name).write_text(broken)
    (entry / "part").write_bytes(b"x")
    assert get(address) == CONTENT
    assert json.loads((entry / "kept.json").read_text())["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_a_cache_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*file"):
        Downloads(tmp_path / "file").get(parse_address(site.put("/model.bin", CONTENT)))


def test_the_proxy_of_the_environment_is_asked(site, get, monkeypatch):
    site.put("/model.bin", CONTENT)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", site.address(""))
    host = "files.example"

    def as_proxy(handler):
        assert handler.path == f"http://{host}/model.bin"
        handler.path = "/model.bin"
        well(handler)

    site.answers = [as_proxy]
    assert get(f"http://{host}/model.bin") == CONTENT
