"""--cache_teacher_states: same training result, and the teacher runs once for all runs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Golden, Workplace, assert_same_weights, command, edit_weights, read_bin, report_lack
from test_processes import run_in_processes
from torch import Tensor, distributed

import main
from data_processing.batching import Collator
from data_processing.features import Features
from distillation.options import parse_options
from distillation.runs import train
from distillation.runtime.device import Process
from distillation.runtime.precision import Precision
from distillation.teacher import cached_states
from distillation.teacher.teacher import Teacher, keep_states
from transformer.heads import TinyBertForSequenceClassification

SHORT = {
    "padding": "longest",
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "train_batch_size": 3,
    "eval_batch_size": 3,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each question to the teacher's states was about."""
    seen: list[int] = []
    forward = TinyBertForSequenceClassification.forward

    def noted(self: Any, input_ids: Tensor, *inputs: Tensor, **wanted: Any) -> Any:
        if not wanted.get("is_student") and not wanted.get("with_logits", True):
            seen.append(len(input_ids))
        return forward(self, input_ids, *inputs, **wanted)

    monkeypatch.setattr(TinyBertForSequenceClassification, "forward", noted)
    return seen


def flags(place: Workplace, name: str, **changes: Any) -> dict[str, Any]:
    values = {"output_dir": place.folder / name, "cache_dir": place.folder / "cache", "cache_teacher_states": True}
    return {**SHORT, **values, **changes}


def weights_of_run(place: Workplace, name: str, **changes: Any) -> dict[str, Tensor]:
    place.run(**flags(place, name, **changes))
    return read_bin(place.folder / name)


def words(place: Workplace) -> str:
    return (place.output / "debug_layer_loss.log").read_text(encoding="utf-8")


def kept(place: Workplace) -> list[Path]:
    """The folders of states in the cache, those that were only begun too."""
    return sorted((place.folder / "cache/teacher_states").glob("*"))


def assert_close_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 2},
        {"group_by_length": True},
        {"gradient_accumulation_steps": 2},
        {"losses": "attention"},
        {"losses": "hidden"},
        {"losses": "embedding"},
        {"losses": "hidden,attention", "layer_map": "6,1,3"},
        {"layer_map": "5,5,6", "group_by_length": True},
        {"amp": True, "amp_dtype": "bf16"},
        {"amp": True, "amp_dtype": "bf16", "opt_level": "O2"},
    ],
    ids=str,
)
def test_a_student_learns_the_same_from_states_that_are_kept(
    sst2: Workplace, asked: list[int], changes: dict[str, Any]
) -> None:
    always = weights_of_run(sst2, "always", **changes, cache_teacher_states=False)
    steps = 2 * 3 * changes.get("gradient_accumulation_steps", 1)
    assert len(asked) == steps
    asked.clear()
    once = weights_of_run(sst2, "once", **changes)
    assert asked == [1, 3, 3, 2]  # the first tells the types
    assert_close_weights(once, always)
    asked.clear()
    assert_same_weights(weights_of_run(sst2, "again", **changes), once)
    assert asked == []


def test_pairs_too(mnli: Workplace) -> None:
    always = weights_of_run(mnli, "always", cache_teacher_states=False, group_by_length=True)
    assert_close_weights(weights_of_run(mnli, "once", group_by_length=True), always)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1, "train_batch_size": 5},
        {"num_train_epochs": 0.5, "workers": 2},
        {"group_by_length": True, "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_another_run_on_the_same_data_finds_them(sst2: Workplace, asked: list[int], changes: dict[str, Any]) -> None:
    weights_of_run(sst2, "first")
    asked.clear()
    found = weights_of_run(sst2, "second", **changes)
    assert asked == []
    assert "the teacher's states of 8 examples are kept from an earlier run" in words(sst2)
    assert_close_weights(found, weights_of_run(sst2, "always", **changes, cache_teacher_states=False))


def test_layers_in_another_order_are_the_same_layers(sst2: Workplace, asked: list[int]) -> None:
    weights_of_run(sst2, "first", layer_map="1,3,6")
    asked.clear()
    weights_of_run(sst2, "second", layer_map="6,1,3")
    assert asked == []


@pytest.mark.parametrize(
    "change",
    [
        lambda place: edit_weights(place.teacher, lambda weights: weights["classifier.bias"].add_(0.1)),
        lambda place: (place.data / "train.tsv").write_text("sentence\tlabel\na film\t1\nno film\t0\nfun\t1\nx\t0\n"),
        lambda place: {"max_seq_length": 8},
        lambda place: {"layer_map": "top"},
        lambda place: {"losses": "hidden,embedding"},
        lambda place: {"losses": "attention,hidden"},
        lambda place: {"amp": True, "amp_dtype": "bf16"},
        lambda place: {"eval_batch_size": 2},
    ],
    ids=["weights", "text", "length", "layers", "no scores", "no embedding", "precision", "batch"],
)
def test_another_question_is_asked_anew(sst2: Workplace, change: Any) -> None:
    weights_of_run(sst2, "first")
    changed = change(sst2)
    weights_of_run(sst2, "second", **(changed if isinstance(changed, dict) else {}))
    assert words(sst2).count("the teacher was asked about") == 2
    assert len(kept(sst2)) == 2


def test_what_is_kept_is_told_before_and_after(sst2: Workplace) -> None:
    weights_of_run(sst2, "model")
    (entry,) = kept(sst2)
    arrays = {file.stem: np.load(file) for file in entry.iterdir()}
    lengths = Golden("sst2_small").figures["feat_input_mask"].sum(axis=1)
    # The embedding output and three layers of 48; three layers of four heads.
    assert {name: array.shape for name, array in arrays.items()} == {
        "hidden": (4 * 48 * lengths.sum(),),
        "scores": (3 * 4 * (lengths**2).sum(),),
    }
    size = sum(array.nbytes for array in arrays.values()) / 1e9
    line = f"the teacher is asked about 8 examples, once for all epochs; {size:.3g} GB of states and scores are kept in"
    assert f"{line} {sst2.folder / 'cache'}" in words(sst2)
    (event,) = sst2.events("teacher_asked_once")
    assert event["examples"] == 8
    assert event["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache_limit": 0}, "nothing is kept, for --cache_limit is 0"),
        ({"cache_limit": 1e-5}, "the states of 8 examples are 0.000148 GB, --cache_limit allows 1e-05"),
    ],
    ids=["no cache", "limit"],
)
def test_states_that_may_not_be_kept_are_asked_for_always(
    sst2: Workplace, asked: list[int], changes: dict[str, Any], reason: str
) -> None:
    always = weights_of_run(sst2, "always", cache_teacher_states=False)
    asked.clear()
    assert_same_weights(weights_of_run(sst2, "once", **changes), always)
    assert len([number for number in asked if number > 1]) == 6
    assert words(sst2).count("--cache_teacher_states: ") == 1
    assert f"--cache_teacher_states: {reason}" in words(sst2)
    assert words(sst2).count("; the teacher is asked in every step instead\n") == 1
    assert kept(sst2) == []
    assert sst2.events("teacher_asked_once") == []


def test_a_folder_that_cannot_be_written_costs_a_line(sst2: Workplace) -> None:
    always = weights_of_run(sst2, "always", cache_teacher_states=False)
    file = sst2.folder / "cache/teacher_states"
    file.write_text("the user's")
    assert_same_weights(weights_of_run(sst2, "once"), always)
    assert f"--cache_teacher_states: {file}: File exists; the teacher is asked in every step" in words(sst2)
    assert file.read_text() == "the user's"


@pytest.mark.parametrize("size", ["128k", "64k"])
def test_a_full_disk_costs_a_line(sst2: Workplace, asked: list[int], size: str) -> None:
    """Of the two files, of 70 and 78 kB, the second does not fit, or neither."""
    always = weights_of_run(sst2, "always", cache_teacher_states=False, cache_dir=sst2.folder / "another")
    asked.clear()
    disk = sst2.folder / "cache"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        report_lack("the right to mount a small disk; the tests of errors while asking check what follows a full one")
        return
    try:
        assert_same_weights(weights_of_run(sst2, "once"), always)
        assert kept(sst2) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert asked[:3] == [1, 3, 3]  # no hours are lost: the room was reserved before asking
    assert len(asked) == 1 + 6
    assert f"--cache_teacher_states: {disk}: No space left on device; the teacher is asked in every step" in words(sst2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "Input/output error", "/a/file"), "/a/file: Input/output error"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "CUDA out of memory. Tried"),
    ],
    ids=["disk", "device"],
)
def test_an_error_while_asking_costs_a_line(
    sst2: Workplace, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(path: Path, place: int, values: np.ndarray) -> None:
        raise error

    always = weights_of_run(sst2, "always", cache_teacher_states=False)
    monkeypatch.setattr(cached_states, "write_values", fail)
    assert_same_weights(weights_of_run(sst2, "once"), always)
    assert f"--cache_teacher_states: {reason}; the teacher is asked in every step instead" in words(sst2)
    assert kept(sst2) == []


def test_an_interrupted_run_leaves_nothing(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, place: int, values: np.ndarray) -> None:
        assert len(kept(sst2)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(cached_states, "write_values", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sst2.run(**flags(sst2, "model"))
    assert kept(sst2) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import main
from distillation.teacher import cached_states

write, left = cached_states.write_values, [3]

def kill(*arguments):
    write(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

cached_states.write_values = kill
main.main(sys.argv[1:])
"""


def test_a_killed_run_leaves_nothing_that_another_would_use(sst2: Workplace) -> None:
    always = weights_of_run(sst2, "always", cache_teacher_states=False)
    done = command("-c", KILLED, *sst2.flags(**flags(sst2, "killed")), cwd=sst2.folder)
    assert done.status == -signal.SIGKILL
    (begun,) = kept(sst2)
    assert begun.name.startswith("making-")
    assert_close_weights(weights_of_run(sst2, "once"), always)
    (entry,) = kept(sst2)
    assert len(entry.name) == 32  # and what was begun is gone


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Have this process compute in one thread, as those of `run_in_processes`: a sum's order follows from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_keep_and_find_what_one_does(sst2: Workplace, asked: list[int]) -> None:
    one = weights_of_run(sst2, "one")
    (entry,) = kept(sst2)
    expected = {file.name: file.read_bytes() for file in entry.iterdir()}
    elsewhere = sst2.folder / "elsewhere"
    runs = [
        flags(sst2, "asked", cache_dir=elsewhere, train_batch_size=4),
        flags(sst2, "found", train_batch_size=4),
        flags(sst2, "refused", train_batch_size=4, cache_limit=1e-5),
    ]
    told = [{"flags": sst2.flags(**run), "gradients": str(sst2.folder / "gradients")} for run in runs]
    run_in_processes(told, sst2.folder, 2)
    alone = weights_of_run(sst2, "alone", train_batch_size=4)
    for name in ("asked", "found", "refused"):
        assert_close_weights(read_bin(sst2.folder / name), alone)
    (entry,) = (elsewhere / "teacher_states").iterdir()
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == expected
    asked.clear()
    assert_same_weights(weights_of_run(sst2, "by one", cache_dir=elsewhere), one)
    assert asked == []


def process_with_less_room(rank: int, store: str, arguments: list[str]) -> None:
    """One of two processes; the second may write no file of more than 4 kB."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    train.run(parse_options(arguments, main.ENTRY), Process(torch.device("cpu"), rank, 2))
    distributed.barrier()
    os._exit(0)


def test_where_one_process_fails_all_go_on_without(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    always = weights_of_run(sst2, "always", cache_teacher_states=False)
    arguments = sst2.flags(**flags(sst2, "once"))
    context = multiprocessing.get_context("spawn")
    given = str(sst2.folder / "store"), arguments
    processes = [context.Process(target=process_with_less_room, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert_close_weights(read_bin(sst2.folder / "once"), always)
    assert kept(sst2) == []


def test_padding_to_the_maximum_is_refused(sst2: Workplace) -> None:
    assert "--padding max_length" in sst2.fails(cache_teacher_states=True)
    message = sst2.fails(**flags(sst2, "model", no_teacher_cache=True))
    assert "--cache_teacher_states and --no_teacher_cache: give one of them" in message


@pytest.mark.parametrize("stage", [{"pred_distill": True}, {"do_finetune": True, "student_model": None}], ids=str)
def test_in_other_stages_the_flag_has_no_effect(sst2: Workplace, stage: dict[str, Any]) -> None:
    without = weights_of_run(sst2, "without", **stage, cache_teacher_states=False)
    for padding in ("longest", "max_length"):
        weights = weights_of_run(sst2, padding, **stage, padding=padding)
        if padding == "longest":
            assert_same_weights(weights, without)
    assert kept(sst2) == []


def test_scores_are_those_of_the_real_pairs(sst2: Workplace) -> None:
    """Each row of a batch, of examples in any order, is what the teacher says of that example alone."""
    teacher = TinyBertForSequenceClassification.from_pretrained(sst2.teacher).eval()
    golden, options = Golden("sst2_small"), parse_options(sst2.flags(**flags(sst2, "model")), main.ENTRY)
    ids, segments, mask = (tensor.numpy() for tensor in golden.inputs())
    lengths = mask.sum(axis=1)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    firsts = (mask * (1 - segments)).sum(axis=1)
    features = Features(ids[mask == 1].astype(np.int32), ends, firsts, np.zeros(len(ids), dtype=np.int64))
    padding, process, layers = Collator(False, golden.case["max_seq_length"]), Process(torch.device("cpu")), (0, 2, 6)
    found = keep_states(teacher, "w", features, padding, (layers, (6, 2)), options, process, Precision())
    asking = Teacher(teacher, kept=found)
    examples = np.array([5, 0, 7, 3])
    said = asking.states(asking.fetch(padding.collate(features, examples)), layers, (6, 2))
    for row, example in enumerate(examples):
        alone = Teacher(teacher).states(padding.collate(features, examples[row : row + 1]), layers, (6, 2))
        n = lengths[example]
        for ours, theirs in zip(said.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, :n], theirs[0])
            assert not ours[row, n:].any()
        for ours, theirs in zip(said.attention_scores, alone.attention_scores, strict=True):
            torch.testing.assert_close(ours[row, :, :n, :n], theirs[0])
            assert not ours[row, :, n:].any()
            assert not ours[row, :, :, n:].any()


def test_a_file_of_another_size_is_asked_for_anew(sst2: Workplace, asked: list[int]) -> None:
    weights_of_run(sst2, "first")
    (entry,) = kept(sst2)
    expected = (entry / "scores.npy").read_bytes()
    np.save(entry / "scores.npy", np.zeros(5, dtype=np.float32))
    asked.clear()
    weights_of_run(sst2, "second")
    assert asked
    assert (entry / "scores.npy").read_bytes() == expected
