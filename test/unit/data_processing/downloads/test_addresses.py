"""Addresses: parsing, redaction, cache keys and file names."""

import pytest

from data_processing.downloads.addresses import is_address, parse_address, redact
from transformer.errors import UserError

HOST = "https:" + "//127.0.0.1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp:" + "//127.0.0.1/x.zip", "only http://, https://, s3://"),
        ("file:" + "///etc/passwd", "only http://, https://, s3://"),
        ("http:" + "//", "names no file"),
        (HOST, "names no file"),
        (f"{HOST}:99999/x", "is no address"),
        ("http:" + "//[/x", "is no address"),
        (f"{HOST}/a b", "names no file"),
        (f"{HOST}/x?\udc80", "names no file"),
        (f"{HOST}/x#sha256=12", "64 hexadecimal digits"),
        (f"{HOST}/x#part", "is not understood"),
    ],
)
def test_an_invalid_address_is_refused_with_the_reason(text, reason):
    assert is_address(text)
    with pytest.raises(UserError) as caught:
        parse_address(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["glue_dir/SST-2", "C:/x", "a:b", ".", "/http/x"])
def test_names_of_folders_are_no_addresses(text):
    assert not is_address(text)


@pytest.mark.parametrize(
    "place",
    ["me:secret@host/x", "me:sec/ret@host/x", "me:secret@host?y@secret", "me:s?ret@host/x", "host/x?a=secret@b"],
)
def test_credentials_are_redacted_in_any_text(place):
    text = redact(f"--x {'http:'}//{place} --y")
    assert not any(part in text for part in ("secret", "ret@", "me:"))
    assert text.endswith(" --y")


def test_an_address_shows_no_credentials():
    address = parse_address("https:" + "//me:secret@127.0.0.1/a/model.zip?v=2&X-Amz-Signature=secret")
    assert address.redacted.startswith("https:" + "//…@127.0.0.1/a/model.zip")
    assert "secret" not in address.redacted + repr(address)


def keys_of(*ends: str) -> set[str]:
    return {parse_address(HOST + "/get" + end).key for end in ends}


@pytest.mark.parametrize(
    "signed",
    [
        "?v=2&X-Amz-Algorithm=A&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=6&X-Amz-SignedHeaders=h"
        "&X-Amz-Signature={0}",
        "?v=2&AWSAccessKeyId=a&Expires={0}&Signature={0}",
        "?v=2&sv=1&st={0}&se={0}&sr=b&sp=r&sig={0}",
        "?v=2&Expires={0}&GoogleAccessId=a&Signature={0}",
        "?v=2&Policy={0}&Key-Pair-Id=a&Signature={0}",
        "?v=2&q-sign-algorithm=sha1&q-ak=a&q-sign-time={0}&q-key-time={0}&q-signature={0}",
    ],
)
def test_the_key_does_not_depend_on_an_expiring_signature(signed):
    assert keys_of(signed.format(1), signed.format("2%2F")) == keys_of("?v=2")
    assert len(keys_of(signed.format(1), signed.format(1).replace("v=2", "v=3"))) == 2


@pytest.mark.parametrize("name", ["key", "sp", "se", "auth", "token", "policy", "expires", "x-oss-process"])
def test_different_addresses_have_different_keys(name):
    ends = [f"?{name}=teacher.zip", f"?{name}=student.zip", "", f"?{name}", f"?{name}=a+b", f"?{name}=a%20b"]
    assert len(keys_of(*ends)) == len(ends)
    assert len(keys_of("?X-Amz-Signature=1&key=a", "?X-Amz-Signature=1&key=b")) == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/model.bin", "model.bin"), ("/a/", "a"), ("/a%2Fb", "b"), ("/%2e%2e", "download"), ("/..%5Cx", "_x")],
)
def test_a_file_name_from_an_address_has_no_path(path, name):
    assert parse_address(HOST + path).name == name


def test_a_file_name_from_an_address_has_no_control_characters():
    assert parse_address(HOST + "/%1b[2J").name.isprintable()
