"""Transfers over real sockets: servers that break off, stall, lie, redirect or refuse; https; S3."""

import datetime
import ipaddress
import logging
import os
import re
import ssl
import sys

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer
from site_with_faults import Site, breaks_off, correct, etag_of, sends, sends_chunks, stalls

from data_processing.downloads import transfer
from data_processing.downloads.archives import Limits

CONTENT = bytes(range(256)) * 8000  # 2 MB: several pieces
OTHER = CONTENT[::-1]
SMALL = Limits(gigabytes=0.001)


class TestResuming:
    @pytest.mark.parametrize("after", [1, 1000, len(CONTENT) - 1])
    def test_a_download_that_broke_off_is_resumed(self, site, get, after):
        site.answers = [breaks_off(after)]
        assert get(site.put("/model.bin", CONTENT)) == CONTENT
        assert site.ranges == [None, f"bytes={after}-"]
        assert site.requests[1][1]["if-range"] == etag_of(CONTENT)

    def test_a_later_command_resumes(self, site, get, refusal):
        site.answers = [breaks_off(5000), *[sends(503)] * 2]
        address = site.put("/model.bin", CONTENT)
        assert "answers 503" in refusal(address)
        assert get(address) == CONTENT
        assert site.ranges[-1] == "bytes=5000-"

    def test_a_complete_part_is_not_requested_again(self, site, get, refusal, tmp_path):
        """A process may be killed after the last byte."""
        site.answers = [breaks_off(5000), *[sends(503)] * 2]
        address = site.put("/model.bin", CONTENT)
        refusal(address)
        (part,) = tmp_path.glob("downloads/*/part")
        part.write_bytes(CONTENT)
        assert get(address) == CONTENT
        assert len(site.requests) == 3

    @pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"a"'}], ids=["no validator", "a weak one"])
    def test_without_a_strong_validator_the_whole_file_is_requested(self, site, get, headers):
        site.answers = [sends(200, len(CONTENT), CONTENT[:1000], **headers)]
        assert get(site.put("/model.bin", CONTENT)) == CONTENT
        assert site.ranges == [None, None]

    @pytest.mark.parametrize(
        ("status", "begin", "total", "etag"),
        [
            (200, 0, len(OTHER), etag_of(OTHER)),
            (206, 1000, len(OTHER), etag_of(OTHER)),
            (206, 999, len(OTHER), etag_of(CONTENT)),
            (206, 1000, len(OTHER) + 1, etag_of(CONTENT)),
            (416, 1000, len(OTHER), etag_of(OTHER)),
        ],
        ids=["another file", "another version", "another place", "another size", "no such range"],
    )
    def test_an_answer_that_does_not_continue_the_part_is_not_appended(self, site, get, status, begin, total, etag):
        def changes(handler):
            site.files["/model.bin"] = OTHER
            part = OTHER[begin:]
            sends(status, len(part), part, ETag=etag, Content_Range=f"bytes {begin}-{total - 1}/{total}")(handler)

        site.answers = [breaks_off(1000), changes]
        assert get(site.put("/model.bin", CONTENT)) == OTHER
        assert site.ranges == [None, "bytes=1000-", None][: 2 if status == 200 else 3]

    def test_a_missing_end_is_noticed_without_a_length(self, site, get):
        site.answers = [sends_chunks(complete=False)]
        assert get(site.put("/model.bin", CONTENT)) == CONTENT
        assert site.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


class TestRetries:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_a_transient_status_is_retried(self, site, get, status):
        site.answers = [sends(status)] * 2
        assert get(site.put("/model.bin", CONTENT)) == CONTENT

    def test_a_server_that_stalls_is_asked_again(self, site, get):
        site.answers = [stalls(1000)]
        assert get(site.put("/model.bin", CONTENT)) == CONTENT
        assert site.ranges == [None, "bytes=1000-"]

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (stalls(), "does not respond in time"),
            (stalls(0), "does not respond in time"),
            (sends(200, len(CONTENT) + 100, CONTENT, ETag='"a"'), "the connection broke off"),
            (sends(503, Retry_After="7200"), "asks to wait 7200 s"),
        ],
    )
    def test_a_server_that_always_fails_is_reported(self, site, refusal, tmp_path, answer, reason):
        site.answers = [answer] * 3
        assert reason in refusal(site.put("/model.bin", CONTENT))
        assert not list(tmp_path.glob("downloads/*/kept.json"))

    @pytest.mark.parametrize(("status", "hint"), [(401, "credentials"), (404, "no such file"), (418, "418")])
    def test_a_permanent_status_is_reported_at_once(self, site, refusal, status, hint):
        site.answers = [sends(status)]
        message = refusal(site.put("/model.bin", CONTENT))
        assert f"answers {status}" in message
        assert hint in message
        assert len(site.requests) == 1

    def test_the_wait_that_a_server_asks_for_is_kept(self, site, get, caplog):
        caplog.set_level(logging.INFO)
        site.answers = [sends(429, Retry_After="1")]
        assert get(site.put("/model.bin", CONTENT)) == CONTENT
        assert "answers 429; another attempt in 1 s" in caplog.text

    def test_a_server_that_refuses_connections_is_reported(self, site, refusal):
        site.close()
        assert "cannot be reached" in refusal(site.address("/model.bin"))


class TestRedirects:
    def test_a_redirect_is_followed_with_the_range(self, site, get):
        site.put("/there.bin", CONTENT)
        here = sends(302, Location="/there.bin")
        site.answers = [here, breaks_off(1000), here]
        assert get(site.address("/model.bin")) == CONTENT
        assert [path for path, _ in site.requests] == ["/model.bin", "/there.bin"] * 2
        assert site.ranges[-1] == "bytes=1000-"

    @pytest.mark.parametrize("target", ["/model.bin", "file:///etc/passwd", "http://["])
    def test_a_redirect_that_leads_nowhere_is_reported(self, site, refusal, target):
        site.answers = [sends(302, Location=target)] * 10
        assert "its redirect" in refusal(site.address("/model.bin"))
        assert len(site.requests) <= 6

    @pytest.mark.parametrize("credentials", ["someone:secret1", "secret1"])
    def test_credentials_reach_their_server_only(self, site, get, tmp_path, caplog, credentials):
        caplog.set_level(logging.DEBUG)
        other = Site()
        try:
            other.put("/there.bin", CONTENT)
            site.answers = [sends(503), sends(302, Location=other.address("/there.bin?token=secret3"))]
            address = site.address("/model.bin?token=secret2").replace("//", f"//{credentials}@")
            assert get(address) == CONTENT
        finally:
            other.close()
        assert site.requests[0][1]["authorization"].startswith("Basic ")
        assert site.requests[0][0] == "/model.bin?token=secret2"
        assert "authorization" not in other.requests[0][1]
        paths = [*tmp_path.rglob("*")]
        records = [path.read_text() for path in paths if path.suffix == ".json"]
        assert records
        for text in (caplog.text, *records, *map(str, paths)):
            assert "secret" not in text
            assert "someone" not in text


class TestSizes:
    def test_a_file_above_the_limit_is_refused_before_it_is_fetched(self, site, refusal, tmp_path):
        assert "--most_gigabytes" in refusal(site.put("/model.bin", CONTENT), SMALL)
        assert not list(tmp_path.glob("downloads/*/part"))

    def test_the_limit_holds_without_a_length(self, site, refusal):
        site.answers = [sends_chunks()]
        assert "--most_gigabytes" in refusal(site.put("/model.bin", CONTENT), SMALL)

    def test_a_file_larger_than_the_disk_is_refused_before_it_is_fetched(self, site, refusal):
        site.answers = [sends(200, 10**15, b"x", ETag='"a"')]
        assert "needs 1e+06 GB" in refusal(site.address("/model.bin"), Limits(gigabytes=1e9))

    def test_progress_shows_size_and_time_left(self, site, get, monkeypatch, caplog):
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(transfer, "SECONDS_BETWEEN_LINES", 0.0)
        get(site.put("/model.bin", CONTENT))
        assert re.search(r"model\.bin: +\d+% \d\.\d+M/2\.05M \[00:00<00:00, .*B/s\]", caplog.text)

    def test_progress_on_a_terminal_is_a_bar(self, site, get, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        get(site.put("/model.bin", CONTENT))
        assert "model.bin:" in capsys.readouterr().err


def test_the_proxy_of_the_environment_is_used(site, get, monkeypatch):
    site.put("/model.bin", CONTENT)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", site.address(""))
    host = "files.example"

    def as_proxy(handler):
        assert handler.path == f"http://{host}/model.bin"
        handler.path = "/model.bin"
        correct(handler)

    site.answers = [as_proxy]
    assert get(f"http://{host}/model.bin") == CONTENT


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with the key and the self-signed certificate of 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    certificate = certificate.add_extension(address, critical=False).sign(key, hashes.SHA256())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM))
    return path


class TestHttps:
    @pytest.fixture
    def secure(self, certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        site = Site(context)
        yield site
        site.close()

    def test_an_untrusted_server_is_refused(self, secure, refusal):
        secure.put("/model.bin", CONTENT)
        assert "certificate" in refusal(secure.address("/model.bin", "https"))
        assert secure.requests == []

    def test_a_redirect_from_https_to_http_is_refused(self, secure, site, certificate, refusal, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.answers = [sends(302, Location=site.put("/model.bin", CONTENT))]
        assert "not safe" in refusal(secure.address("/model.bin", "https"))
        assert site.requests == []

    def test_a_redirect_from_http_to_https_is_followed(self, secure, site, certificate, get, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.put("/model.bin", CONTENT)
        site.answers = [sends(302, Location=secure.address("/model.bin", "https"))]
        assert get(site.address("/model.bin")) == CONTENT


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http:" + f"//127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


class TestS3:
    """moto's server is an S3 over HTTP; AWS's own environment variable names the endpoint."""

    @pytest.fixture
    def client(self, server, monkeypatch):
        for name, value in {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        return client

    def test_an_object_is_kept_and_fetched_again_when_it_changes(self, client, get, caplog):
        caplog.set_level(logging.INFO)
        for content in (CONTENT, OTHER):
            client.put_object(Bucket="models", Key="a/model b.bin", Body=content)
            assert get("s3://models/a/model%20b.bin") == get("s3://models/a/model%20b.bin") == content
        assert caplog.text.count("the server has no other version") == 2

    def test_a_large_object_arrives_in_parts(self, client, get):
        content = os.urandom(20 * 2**20)
        client.put_object(Bucket="models", Key="large.bin", Body=content)
        assert get("s3://models/large.bin") == content

    def test_an_object_above_the_limit_is_refused(self, client, refusal):
        client.put_object(Bucket="models", Key="model.bin", Body=CONTENT)
        assert "--most_gigabytes" in refusal("s3://models/model.bin", SMALL)

    @pytest.mark.parametrize("address", ["s3://models/none.bin", "s3://no-such-bucket/none.bin"])
    def test_an_object_that_does_not_exist_is_reported(self, client, refusal, address):
        assert "answers 404" in refusal(address)

    @pytest.mark.parametrize("answer", [sends(403), sends(503), stalls(0)], ids=["403", "503", "stalls"])
    def test_a_failing_server_is_reported_without_credentials(self, client, refusal, site, monkeypatch, answer):
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.address(""))
        site.put("/models/model.bin", CONTENT)
        site.answers = [answer] * 20
        assert "secret" not in refusal("s3://models/model.bin")

    def test_a_missing_boto3_is_reported(self, refusal, monkeypatch):
        monkeypatch.setitem(sys.modules, "boto3", None)
        assert "requirements-s3.txt" in refusal("s3://models/model.bin")

    def test_a_public_object_needs_no_credentials(self, client, get, site, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.address(""))
        site.put("/models/model.bin", CONTENT)
        assert get("s3://models/model.bin") == CONTENT
        assert "authorization" not in site.requests[0][1]
