"""A cache for the downloads of a test."""

import pytest

from data_processing.downloads.addresses import parse_address
from data_processing.downloads.store import Downloads
from data_processing.downloads.transfer import RetryPolicy
from transformer.errors import UserError

QUICK = RetryPolicy(timeout=(1.0, 0.3), attempts=3, backoff=0.01)


@pytest.fixture
def get(tmp_path):
    """Fetches an address into a cache; returns the file's content."""

    def get(text: str, limits=None, **settings) -> bytes:
        (file,) = Downloads(tmp_path, limits, QUICK).get(parse_address(text), **settings).iterdir()
        return file.read_bytes()

    return get


@pytest.fixture
def refusal(get):
    """Returns the message of a download that fails."""

    def refusal(text: str, limits=None) -> str:
        with pytest.raises(UserError) as caught:
            get(text, limits)
        return str(caught.value)

    return refusal
