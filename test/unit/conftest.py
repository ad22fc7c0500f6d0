"""Where the tests find the project, and how many threads they use."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[2]))

import cases
import pytest
import torch
from hypothesis import settings
from site_with_faults import Site

# Of the property tests: the same examples each time; `--hypothesis-profile=thorough` tries more, and new ones.
settings.register_profile("usual", max_examples=50, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=1000, deadline=None, database=None)
settings.load_profile("usual")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the machine lacks, and how many tests passed by checking what happens without it."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    lines = [line for report in passed for line in report.capstdout.splitlines() if line.startswith(cases.LACKING)]
    for line, count in Counter(lines).items():
        terminalreporter.write_line(f"{line} (tests: {count})")


@pytest.fixture(scope="session", params=["sst2_small", "mnli_small"])
def golden(request) -> cases.Golden:
    """Each of the golden cases."""
    return cases.Golden(request.param)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> None:
    """What runs keep for the next one, in this process and those it starts, is kept apart from the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def tiny_numbers() -> Iterator[None]:
    """A run in this process sets them to 0, which Hypothesis's floats refuse to do without."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def sst2(tmp_path) -> cases.Workplace:
    """The golden SST-2 case as a user's folders: eight sentences, a teacher of six layers, a student of three."""
    return cases.Golden("sst2_small").workplace(tmp_path)


@pytest.fixture
def mnli(tmp_path) -> cases.Workplace:
    """The golden MNLI case as a user's folders: nine pairs, a teacher of eight layers, a student of two."""
    return cases.Golden("mnli_small").workplace(tmp_path)


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on this machine, for downloads."""
    site = Site()
    yield site
    site.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the processes that a test compares with: the order of a sum depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
