"""Downloads by https: from whom they are, and no way back to http; and what is shown while they last."""

import datetime
import ipaddress
import logging
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from site_with_faults import Site, breaks_off, says

from data_processing.downloads import transfer
from data_processing.downloads.addresses import parse_address
from data_processing.downloads.store import Downloads
from data_processing.downloads.transfer import Patience
from transformer.errors import UserError

CONTENT = bytes(range(256)) * 8000
QUICK = Patience(connect=1.0, silent=0.5, tries=3, pause=0.01, longest_pause=0.02)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with the key and the certificate of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(key.private_bytes(*form) + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    site = Site(context)
    yield site
    site.close()


@pytest.fixture
def plain():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def get(tmp_path):
    def get(text: str) -> bytes:
        (file,) = Downloads(tmp_path / "downloads", None, QUICK).get(parse_address(text)).iterdir()
        return file.read_bytes()

    return get


def test_a_server_that_proves_itself_is_read_and_gone_on_with(secure, certificate, get, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure.put("/model.bin", CONTENT)
    secure.answers = [breaks_off(1000)]
    assert get(secure.address("/model.bin", "https")) == CONTENT
    assert secure.requests[-1][1]["range"] == "bytes=1000-"


def test_a_server_that_does_not_is_refused_at_once(secure, get):
    secure.put("/model.bin", CONTENT)
    with pytest.raises(UserError, match="the server's certificate cannot be trusted"):
        get(secure.address("/model.bin", "https"))
    assert secure.requests == []


def test_a_way_back_to_http_is_refused(secure, plain, certificate, get, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure.answers = [says(302, Location=plain.put("/model.bin", CONTENT))]
    with pytest.raises(UserError, match=r"sends from https to http .*, which is not safe"):
        get(secure.address("/model.bin", "https"))
    assert plain.requests == []


def test_the_way_from_http_to_https_is_gone(secure, plain, certificate, get, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure.put("/model.bin", CONTENT)
    plain.answers = [says(302, Location=secure.address("/model.bin", "https"))]
    assert get(plain.address("/model.bin")) == CONTENT


def test_a_server_that_speaks_no_tls_is_told(plain, get):
    plain.put("/model.bin", CONTENT)
    with pytest.raises(UserError, match="cannot be fetched: the connection broke off"):
        get(plain.address("/model.bin", "https"))


def test_progress_tells_how_much_there_is_and_how_long_it_takes(plain, get, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(transfer, "_SECONDS_BETWEEN_LINES", 0.0)
    get(plain.put("/model.bin", CONTENT))
    assert "model.bin: 2.0 of 2.0 MB (100 %), 0 s left" in caplog.text
    assert caplog.text.count(" s left") > 3


def test_on_a_terminal_progress_is_a_bar(plain, get, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    get(plain.put("/model.bin", CONTENT))
    assert "model.bin:" in capsys.readouterr().err
