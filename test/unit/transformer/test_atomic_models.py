"""Trap 21, of a whole model: weights, config and vocabulary are all of the old model or all of the new.

A process is killed before each single step that a saving takes on the disk: the folder must then load as one of the
two models, though they differ in size, case, vocabulary and form of the weights' file.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Golden, Workplace, assert_same_weights, encoder_shapes, linear, weights_of
from safetensors.torch import save_file

from data_processing.tasks import find_task
from distillation.checkpoints.outputs import save_model
from distillation.checkpoints.results import copy_outputs
from distillation.models import choose_case, load_complete
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights
from transformer.saving import changed_files, read_manifest
from transformer.tokenization import BertTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SST2 = find_task("SST-2")
STEPS = ("replace", "unlink", "fsync")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Golden("sst2_small").workplace(tmp_path)


def save_old(place: Workplace, folder: Path, form: str) -> dict[str, torch.Tensor]:
    """A model as this project saves it, or as another one does: no manifest, and safetensors."""
    if form == "ours":
        loaded = load_complete(place.teacher, SST2, True)
        save_model(folder, loaded.model.config, loaded.model.state_dict(), loaded.tokenizer)
    else:
        shutil.copytree(place.teacher, folder)
        save_file(read_weights(folder), folder / "model.safetensors")
        (folder / "pytorch_model.bin").unlink()
    return read_weights(folder)


def save_new(place: Workplace, folder: Path) -> dict[str, torch.Tensor]:
    """Another model into the same folder: smaller, cased, with a shorter vocabulary."""
    vocabulary = place.folder / "new_vocab.txt"
    lines = (place.teacher / "vocab.txt").read_text(encoding="utf-8").splitlines()[:-3]
    if not vocabulary.exists():
        vocabulary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = Golden("sst2_small").config("student") | {"vocab_size": len(lines)}
    weights = weights_of(encoder_shapes(values) | linear("classifier", values["hidden_size"], 2))
    save_model(folder, BertConfig.from_dict(values), weights, BertTokenizer(vocabulary, False))
    return weights


def die_before(step: int, action: Callable[[], object]) -> bool:
    """Does it in a process that is killed before its so-many-th step on the disk; whether it came so far."""

    def run() -> None:
        left = step

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def counting(*given: object, **named: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*given, **named)

            return counting

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("form", ["ours", "safetensors"])
def test_a_kill_between_any_two_steps_leaves_one_model(place: Workplace, form: str) -> None:
    folder, step, seen = place.folder / "saved", 0, []
    words = len((place.teacher / "vocab.txt").read_text(encoding="utf-8").splitlines())
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        old = save_old(place, folder, form)
        if not die_before(step, lambda: save_new(place, folder)):
            break
        loaded = load_complete(folder, SST2, choose_case(None, (folder,)))
        new = not loaded.tokenizer.do_lower_case
        layers, tokens = (3, words - 3) if new else (6, words)
        assert (loaded.model.config.num_hidden_layers, len(loaded.tokenizer)) == (layers, tokens)
        if new:
            assert changed_files(folder) == []
        else:
            assert_same_weights(read_weights(folder), old)
        seen.append(new)
        expected = save_new(place, folder)  # the next saving clears away what was left
        assert_same_weights(read_weights(folder), expected)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert "model.safetensors" not in {path.name for path in folder.iterdir()}
        step += 1
    assert seen == sorted(seen)  # first the old one, from some step on the new one
    assert False in seen
    assert True in seen
    assert step >= 12


def test_a_reader_that_may_not_write_says_so(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.folder / "saved"
    save_old(place, folder, "ours")
    step = 8
    while read_manifest(folder) == read_manifest(place.folder / "before") or not list(folder.glob(".*")):
        shutil.rmtree(folder)
        save_old(place, folder, "ours")
        shutil.copytree(folder, place.folder / "before", dirs_exist_ok=True)
        assert die_before(step, lambda: save_new(place, folder))
        step += 1

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="broken off and cannot be ended"):
        BertConfig.from_pretrained(folder)


def test_the_manifest_tells_whole_and_changed_models_apart(place: Workplace) -> None:
    folder = place.folder / "saved"
    save_old(place, folder, "ours")
    assert changed_files(folder) == []
    with (folder / "pytorch_model.bin").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x")
    (folder / "config.json").unlink()
    assert changed_files(folder) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"id": "../../x", "files": {}}',
        b'{"id": "0123456789abcdef", "files": {"../teacher/config.json": {}, "pytorch_model.bin": 3}}',
    ],
)
def test_a_strange_manifest_changes_nothing(place: Workplace, content: bytes) -> None:
    """It may come from anybody: names in it lead nowhere else."""
    (place.student / "model_manifest.json").write_bytes(content)
    (place.student / ".x.0123456789abcdef.new").write_bytes(b"x")
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    load_complete(place.student, SST2, True)
    assert {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()} == before


def limited(size: int, action: Callable[[], object]) -> str:
    """What is said by a process that may write no file beyond a size, as on a disk that fills up."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            action()
        except UserError as error:
            sender.send(str(error))
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == 0
    return receiver.recv() if receiver.poll() else ""


@pytest.mark.parametrize("size", [100, 5_000, 60_000])
def test_a_disk_that_fills_up_leaves_the_old_model(place: Workplace, size: int) -> None:
    """Whichever of the files does not fit."""
    folder = place.folder / "saved"
    old = save_old(place, folder, "ours")
    save_new(place, place.folder / "other")
    words = limited(size, lambda: save_new(place, folder))
    assert words == f"{folder}: the model cannot be saved (File too large)"
    assert_same_weights(read_weights(folder), old)
    assert changed_files(folder) == []
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_copies_are_whole_too(place: Workplace) -> None:
    """Of --data_url: a copy that is broken off leaves the model that was there, or the new one."""
    folder, target, step, seen = place.folder / "saved", place.folder / "copy", 0, []
    new = save_old(place, folder, "ours")
    (folder / "eval_results.txt").write_text("acc = 1.0\n", encoding="utf-8")
    while True:
        shutil.rmtree(target, ignore_errors=True)
        save_new(place, target)
        if not die_before(step, lambda: copy_outputs(folder, str(target), SST2)):
            break
        loaded = load_complete(target, SST2, choose_case(None, (target,)))
        assert changed_files(target) == []
        seen.append(loaded.model.config.num_hidden_layers)
        step += 1
    assert len(set(seen)) == 2
    assert_same_weights(read_weights(target), new)
    assert (target / "eval_results.txt").read_text(encoding="utf-8") == "acc = 1.0\n"
