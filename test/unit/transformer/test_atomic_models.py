"""Saving a whole model (trap 21): a kill or a full disk leaves the old model or the new one.

A process is killed before each call by which a save changes the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from cases import Golden, Workplace, assert_same_weights, encoder_shapes, linear, weights_of
from disk_faults import killed_before, no_file_beyond
from safetensors.torch import save_file

from data_processing.tasks import find_task
from distillation.checkpoints.outputs import copy_outputs, save_model
from distillation.models import choose_case, load_complete
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import MODEL_FILES, read_weights
from transformer.tokenization import BertTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SST2 = find_task("SST-2")


def save_old(place: Workplace, folder: Path, form: str = "") -> dict[str, torch.Tensor]:
    """Save the teacher, or copy it with its weights as safetensors."""
    if form == "safetensors":
        shutil.copytree(place.teacher, folder)
        save_file(read_weights(folder), folder / "model.safetensors")
        (folder / "pytorch_model.bin").unlink()
    else:
        loaded = load_complete(place.teacher, SST2, True)
        save_model(folder, loaded.model.config, loaded.model.state_dict(), loaded.tokenizer)
    return read_weights(folder)


def save_later(place: Workplace, folder: Path) -> dict[str, torch.Tensor]:
    """Save the teacher with other weights, as a later save of the same run does."""
    loaded = load_complete(place.teacher, SST2, True)
    weights = {key: tensor + 1 for key, tensor in loaded.model.state_dict().items()}
    save_model(folder, loaded.model.config, weights, loaded.tokenizer)
    return weights


def save_other(place: Workplace, folder: Path) -> dict[str, torch.Tensor]:
    """Save another model: smaller, cased, with a shorter vocabulary."""
    vocabulary = place.folder / "other_vocab.txt"
    lines = (place.teacher / "vocab.txt").read_text(encoding="utf-8").splitlines()[:-3]
    vocabulary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = Golden("sst2_small").config("student") | {"vocab_size": len(lines)}
    weights = weights_of(encoder_shapes(values) | linear("classifier", values["hidden_size"], 2))
    save_model(folder, BertConfig.from_dict(values), weights, BertTokenizer(vocabulary, False))
    return weights


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def found_model(folder: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> str:
    """Return which of two models a folder holds, `none` if it has no weights; fail for a mixture."""
    if not names(folder) & {"pytorch_model.bin", "model.safetensors"}:
        return "none"
    load_complete(folder, SST2, choose_case(None, (folder,)))  # weights, configuration and vocabulary fit
    weights = read_weights(folder)
    is_old = weights.keys() == old.keys() and torch.equal(weights["classifier.bias"], old["classifier.bias"])
    assert_same_weights(weights, old if is_old else new)
    return "old" if is_old else "new"


@pytest.mark.parametrize(
    ("form", "save", "expected"),
    [
        ("", save_later, ["old", "new"]),
        ("", save_other, ["old", "none", "new"]),
        ("safetensors", save_other, ["old", "none", "new"]),
    ],
    ids=["same configuration", "another configuration", "another configuration, safetensors"],
)
def test_a_kill_leaves_one_whole_model(sst2: Workplace, form: str, save, expected: list[str]) -> None:
    """For a moment there are no weights, where a model with another configuration is replaced."""
    place, seen = sst2, []
    folder, kept = place.folder / "saved", place.folder / "old"
    old, new = save_old(place, kept, form), save(place, place.folder / "new")
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        if not killed_before(len(seen), lambda: save(place, folder)):
            break
        before = names(folder)
        seen.append(found_model(folder, old, new))
        assert names(folder) == before  # readers never write
        save(place, folder)  # the next save removes temporary files
        assert_same_weights(read_weights(folder), new)
        assert names(folder) == set(MODEL_FILES)
    assert [model for number, model in enumerate(seen) if seen[:number][-1:] != [model]] == expected
    assert len(seen) >= 4


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_file_that_does_not_fit_on_the_disk_leaves_the_old_model(
    sst2: Workplace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, folder, fsync = sst2, sst2.folder / "saved", os.fsync
    old = save_old(place, folder)

    def fill(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(UserError, match="No space left on device"):
        save_other(place, folder)
    assert found_model(folder, old, {}) == "old"
    assert names(folder) == set(MODEL_FILES)


def test_torchs_own_writer_reports_a_full_disk(sst2: Workplace) -> None:
    folder = sst2.folder / "saved"
    old = save_old(sst2, folder)
    with no_file_beyond(60_000), pytest.raises(UserError, match="File too large"):
        save_later(sst2, folder)
    assert found_model(folder, old, {}) == "old"
    assert names(folder) == set(MODEL_FILES)


def test_a_kill_while_outputs_are_copied_leaves_one_whole_model(sst2: Workplace) -> None:
    """The copy of --data_url."""
    place, seen = sst2, []
    folder, target, kept = (place.folder / name for name in ("saved", "copy", "old"))
    new, old = save_old(place, folder), save_other(place, kept)
    (folder / "eval_results.txt").write_text("acc = 1.0\n", encoding="utf-8")
    while True:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(kept, target)
        if not killed_before(len(seen), lambda: copy_outputs(folder, str(target), SST2)):
            break
        seen.append(found_model(target, old, new))
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]
    assert found_model(target, old, new) == "new"
    assert (target / "eval_results.txt").read_text(encoding="utf-8") == "acc = 1.0\n"
