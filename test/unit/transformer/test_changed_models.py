"""A model's folder whose files are no longer those that were saved together: each such file is named, and used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Golden, Workplace, edit_config
from safetensors.torch import save_file

from data_processing.tasks import find_task
from distillation.checkpoints.outputs import save_model
from distillation.models import load_complete
from transformer.file_utils import read_weights

SST2 = find_task("SST-2")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """With a teacher that this project has saved."""
    place = Golden("sst2_small").workplace(tmp_path)
    loaded = load_complete(place.teacher, SST2, True)
    save_model(place.teacher, loaded.model.config, loaded.model.state_dict(), loaded.tokenizer)
    return place


def flip_a_bit(path: Path) -> None:
    """Of a tensor's values: in the middle, where every reader takes it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def warned(told: str) -> list[str]:
    """The paths that warnings name."""
    return [line.partition(":")[0] for line in told.splitlines() if "is not the file that was saved" in line]


CHANGES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: edit_config(folder, hidden_dropout_prob=0.2),
    "vocab.txt": lambda folder: (folder / "vocab.txt").write_bytes(
        (folder / "vocab.txt").read_bytes().strip()[:-1] + b"~\n"
    ),
    "pytorch_model.bin": lambda folder: flip_a_bit(folder / "pytorch_model.bin"),
    "model.safetensors": lambda folder: save_file(read_weights(folder), folder / "model.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_training_run_names_what_was_changed(place: Workplace, name: str) -> None:
    """Once, and no other file; the run goes on with what is there."""
    flags = {"do_finetune": True, "student_model": None, "overwrite_output_dir": True}
    assert warned(place.run(**flags).out) == []
    CHANGES[name](place.teacher)
    assert warned(place.run(**flags).out) == [str(place.teacher / name)]


def test_an_evaluation_names_what_was_changed(place: Workplace) -> None:
    """Weights by their size alone: hashing them would take longer than loading them."""
    flags = {"do_eval": True, "teacher_model": None, "student_model": place.teacher}
    assert warned(place.run(**flags).out) == []
    edit_config(place.teacher, hidden_dropout_prob=0.2)
    with (place.teacher / "pytorch_model.bin").open("ab") as file:
        file.write(bytes(100))
    named = warned(place.run(**flags, overwrite_output_dir=True).out)
    assert named == [str(place.teacher / name) for name in ("config.json", "pytorch_model.bin")]


def test_a_model_of_another_program_is_told_nothing(place: Workplace) -> None:
    """It has no manifest; nor do weights count that were turned into safetensors in the old ones' place."""
    CHANGES["model.safetensors"](place.teacher)
    (place.teacher / "pytorch_model.bin").unlink()
    other = shutil.copytree(place.teacher, place.folder / "other")
    (other / "model_manifest.json").unlink()
    edit_config(other, hidden_dropout_prob=0.2)
    for folder in (place.teacher, other):
        done = place.run(do_eval=True, teacher_model=None, student_model=folder, overwrite_output_dir=True)
        assert warned(done.out) == []
