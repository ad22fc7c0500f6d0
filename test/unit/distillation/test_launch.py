"""How a run of several spawned processes ends: its first cause is reported, and a signal is never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import Run, command

HERE = Path(__file__).parents[1]
WAYS = ("mistake", "fault", "exit", "signal")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("launched")
    return command(str(HERE / "launched_runs.py"), *WAYS, cwd=folder, PYTHONPATH=f"{HERE}:{HERE.parents[1]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind", "text"),
    [
        ("mistake", "UserError", "a file is missing"),
        ("fault", "RunFailed", "process 1 failed"),
        ("exit", "RunFailed", "process 1 ended with status 3"),
        ("signal", "Stopped", "SIGTERM"),
    ],
)
def test_the_first_cause_is_reported_alone(launched: Run, way: str, kind: str, text: str) -> None:
    """Not the exchange that process 0 then loses; and a signal that comes when the run ends still ends a script."""
    assert launched.err == ""
    raised = json.loads(launched.out.splitlines()[WAYS.index(way)])
    assert raised[0] == kind
    assert text in raised[1]
