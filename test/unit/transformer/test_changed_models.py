"""A warning names each file of a model that is not the one saved with it; the file is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Workplace, edit_config
from safetensors.torch import save_file

from data_processing.tasks import find_task
from distillation.checkpoints.outputs import save_model
from distillation.checkpoints.run_record import write_run
from distillation.models import load_complete
from transformer.file_utils import read_weights


@pytest.fixture
def place(sst2: Workplace) -> Workplace:
    """A workplace whose teacher was saved by this project."""
    loaded = load_complete(sst2.teacher, find_task("SST-2"), True)
    digests = save_model(sst2.teacher, loaded.model.config, loaded.model.state_dict(), loaded.tokenizer)
    write_run(sst2.teacher, {}, digests)
    return sst2


def edit_byte(path: Path) -> None:
    """Change a byte in the middle, where weights have values and a vocabulary has a token."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def warned(place: Workplace, **flags) -> list[str]:
    """Return the paths of the changed files that a run names."""
    lines = place.run(**flags, overwrite_output_dir=True).out.splitlines()
    return [line.partition(":")[0] for line in lines if "is not the file that was saved" in line]


def warned_in_evaluation(place: Workplace, folder: Path) -> list[str]:
    return warned(place, do_eval=True, teacher_model=None, student_model=folder)


CHANGES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: edit_config(folder, hidden_dropout_prob=0.2),
    "vocab.txt": lambda folder: edit_byte(folder / "vocab.txt"),
    "pytorch_model.bin": lambda folder: edit_byte(folder / "pytorch_model.bin"),
    "model.safetensors": lambda folder: save_file(read_weights(folder), folder / "model.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_names_the_changed_file_and_no_other(place: Workplace, name: str) -> None:
    """An evaluation does not hash the weights, which would take longer than loading them."""
    CHANGES[name](place.teacher)
    path = str(place.teacher / name)
    assert warned(place, do_finetune=True, student_model=None) == [path]
    assert warned_in_evaluation(place, place.teacher) == ([] if name == "pytorch_model.bin" else [path])


def test_unchanged_files_and_weights_converted_to_safetensors_give_no_warning(place: Workplace) -> None:
    assert warned(place, do_finetune=True, student_model=None) == warned_in_evaluation(place, place.teacher) == []
    CHANGES["model.safetensors"](place.teacher)
    (place.teacher / "pytorch_model.bin").unlink()
    assert warned_in_evaluation(place, place.teacher) == []


@pytest.mark.parametrize("content", [None, b"[]", b'{"model": 3}', b'{"model": {"../x": 3, "vocab.txt.": [0]}}'])
def test_without_a_run_json_of_this_project_there_is_no_warning(place: Workplace, content: bytes | None) -> None:
    """The folder may come from anyone."""
    (place.teacher / "run.json").unlink()
    if content is not None:
        (place.teacher / "run.json").write_bytes(content)
    edit_config(place.teacher, hidden_dropout_prob=0.2)
    assert warned_in_evaluation(place, place.teacher) == []


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "pytorch_model.bin"])
def test_a_file_that_cannot_be_read_is_refused_by_name(place: Workplace, name: str) -> None:
    """Reading the start of /proc/self/mem fails for every user, root too."""
    (place.teacher / name).unlink()
    (place.teacher / name).symlink_to("/proc/self/mem")
    assert str(place.teacher / name) in place.fails()
