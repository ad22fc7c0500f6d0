"""The console commands that pyproject.toml declares."""

import importlib
import re
import subprocess
import sys

import pytest
from cases import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r'^(tinybert-[\w-]+) = "distillation\.commands:(\w+)"$', PYPROJECT, re.MULTILINE))


def test_every_declared_command_exists():
    names = {"tinybert-main", "tinybert-distill", "tinybert-augment", "tinybert-download", "tinybert-new-student"}
    assert set(COMMANDS) == names
    module = importlib.import_module("distillation.commands")
    assert all(callable(getattr(module, name)) for name in COMMANDS.values())


@pytest.mark.slow
def test_a_mistake_in_the_flags_of_a_command_ends_it_with_status_2():
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"from distillation.commands import {function}; {function}()", "--no_such_flag"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, function in COMMANDS.items()
    }
    for name, process in started.items():
        error = process.communicate()[1]
        assert (name, process.returncode, error.count("\n")) == (name, 2, 1), error
