"""The console commands of pyproject.toml: each runs a file of this project as `python FILE` does.

Running the file keeps its handling of signals, which begins before the slow imports, and its exit status.
"""

from __future__ import annotations

import runpy


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run main.py."""
    _run("main")


def distill() -> None:
    """Run task_distill.py."""
    _run("task_distill")


def augment() -> None:
    """Run data_processing/data_augmentation.py."""
    _run("data_processing.data_augmentation")


def download() -> None:
    """Run data_processing/download.py."""
    _run("data_processing.download")


def new_student() -> None:
    """Run distillation/new_student.py."""
    _run("distillation.new_student")
