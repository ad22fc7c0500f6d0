"""--cache_teacher_states: training is the same, and the teacher runs once for all runs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
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
from data_processing.cache import Cache
from data_processing.features import Features
from distillation.evaluation import Predictor
from distillation.options import parse_options
from distillation.runs.train import train
from distillation.runtime.device import Process
from distillation.runtime.full_precision import Precision
from distillation.teacher import cached_states
from distillation.teacher.cached_states import load_or_compute_states
from distillation.teacher.query import TeacherQuery
from distillation.teacher.teacher import Teacher
from transformer.heads import TinyBertForSequenceClassification

BATCHES = {"train_batch_size": 3, "eval_batch_size": 3}
SHORT = {"padding": "longest", "num_train_epochs": 2, "learning_rate": 1e-3, **BATCHES}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of examples of each batch for which the teacher computes states."""
    seen: list[int] = []
    forward = TinyBertForSequenceClassification.forward

    def recorded(self: Any, input_ids: Tensor, *inputs: Tensor, **wanted: Any) -> Any:
        if not wanted.get("is_student") and not wanted.get("with_logits", True):
            seen.append(len(input_ids))
        return forward(self, input_ids, *inputs, **wanted)

    monkeypatch.setattr(TinyBertForSequenceClassification, "forward", recorded)
    return seen


def flags(place: Workplace, name: str, **changes: Any) -> dict[str, Any]:
    values = {"output_dir": place.folder / name, "cache_dir": place.folder / "cache", "cache_teacher_states": True}
    return {**SHORT, **values, **changes}


def weights_of_run(place: Workplace, name: str, **changes: Any) -> dict[str, Tensor]:
    place.run(**flags(place, name, **changes))
    return read_bin(place.folder / name)


def log_of(place: Workplace) -> str:
    return (place.output / "debug_layer_loss.log").read_text(encoding="utf-8")


def entries(place: Workplace) -> list[Path]:
    """Return the cache's folders of states, also incomplete ones."""
    return sorted((place.folder / "cache/teacher_states").glob("*"))


def assert_warned_once(place: Workplace, reason: str) -> None:
    (line,) = [line for line in log_of(place).splitlines() if "--cache_teacher_states: " in line]
    assert reason in line


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
def test_cached_states_give_the_weights_of_a_live_teacher(
    sst2: Workplace, batches: list[int], changes: dict[str, Any]
) -> None:
    live = weights_of_run(sst2, "live", **changes, cache_teacher_states=False)
    steps = 2 * 3 * changes.get("gradient_accumulation_steps", 1)
    assert len(batches) == steps
    batches.clear()
    cached = weights_of_run(sst2, "once", **changes)
    assert batches == [1, 3, 3, 2]  # the first batch shows the types
    assert_close_weights(cached, live)
    batches.clear()
    assert_same_weights(weights_of_run(sst2, "again", **changes), cached)
    assert batches == []


def test_cached_states_of_pairs_give_the_weights_of_a_live_teacher(mnli: Workplace) -> None:
    live = weights_of_run(mnli, "live", cache_teacher_states=False, group_by_length=True)
    assert_close_weights(weights_of_run(mnli, "once", group_by_length=True), live)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1, "train_batch_size": 5},
        {"num_train_epochs": 0.5, "workers": 2},
        {"group_by_length": True, "gradient_accumulation_steps": 3},
        {"layer_map": "6,2,4"},  # the same layers in another order
    ],
    ids=str,
)
def test_another_run_on_the_same_data_reads_the_cached_states(
    sst2: Workplace, batches: list[int], changes: dict[str, Any]
) -> None:
    weights_of_run(sst2, "first")
    batches.clear()
    found = weights_of_run(sst2, "second", **changes)
    assert batches == []
    assert "the teacher's states of 8 examples were cached by an earlier run" in log_of(sst2)
    assert_close_weights(found, weights_of_run(sst2, "live", **changes, cache_teacher_states=False))


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
def test_other_states_have_another_cache_entry(sst2: Workplace, change: Any) -> None:
    weights_of_run(sst2, "first")
    changed = change(sst2)
    weights_of_run(sst2, "second", **(changed if isinstance(changed, dict) else {}))
    assert log_of(sst2).count("computing the teacher's states of") == 2
    assert len(entries(sst2)) == 2


def test_the_size_of_the_states_is_logged_before_they_are_computed(sst2: Workplace) -> None:
    weights_of_run(sst2, "model")
    (entry,) = entries(sst2)
    arrays = {file.stem: np.load(file) for file in entry.iterdir()}
    lengths = Golden("sst2_small").figures["feat_input_mask"].sum(axis=1)
    # The embedding output and three layers of 48; three layers of four heads.
    assert {name: array.shape for name, array in arrays.items()} == {
        "hidden": (4 * 48 * lengths.sum(),),
        "scores": (3 * 4 * (lengths**2).sum(),),
        "checksums": (2 * len(lengths),),
    }
    size = sum(array.nbytes for array in arrays.values()) / 1e9
    log = log_of(sst2)
    assert log.index(f"{size:.3g} GB are cached in {sst2.folder / 'cache'}") < log.index(
        "computed the teacher's states"
    )
    (event,) = sst2.events("teacher_cache")
    assert event["examples"] == 8
    assert event["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache_limit": 0}, "--cache_limit is 0"),
        ({"cache_limit": 1e-5}, "0.000148 GB, --cache_limit allows 1e-05"),
    ],
    ids=["no cache", "limit"],
)
def test_states_that_may_not_be_cached_are_computed_in_every_step(
    sst2: Workplace, batches: list[int], changes: dict[str, Any], reason: str
) -> None:
    live = weights_of_run(sst2, "live", cache_teacher_states=False)
    batches.clear()
    assert_same_weights(weights_of_run(sst2, "once", **changes), live)
    assert len([number for number in batches if number > 1]) == 6
    assert_warned_once(sst2, reason)
    assert entries(sst2) == []
    assert sst2.events("teacher_cache") == []


def test_a_cache_that_cannot_be_written_gives_one_warning(sst2: Workplace) -> None:
    live = weights_of_run(sst2, "live", cache_teacher_states=False)
    file = sst2.folder / "cache/teacher_states"
    file.write_text("the user's")
    assert_same_weights(weights_of_run(sst2, "once"), live)
    assert_warned_once(sst2, f"{file}: File exists")
    assert file.read_text() == "the user's"


@pytest.mark.parametrize("size", ["128k", "64k"])
def test_a_full_disk_gives_one_warning(sst2: Workplace, batches: list[int], size: str) -> None:
    """The files have 70 and 78 kB: either the second does not fit, or neither does."""
    live = weights_of_run(sst2, "live", cache_teacher_states=False, cache_dir=sst2.folder / "another")
    batches.clear()
    disk = sst2.folder / "cache"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        report_lack("the right to mount a small disk; the test of errors checks what follows from a full one")
        return
    try:
        assert_same_weights(weights_of_run(sst2, "once"), live)
        assert entries(sst2) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert batches[:3] == [1, 3, 3]  # the space is reserved first, so that no computed states are lost
    assert len(batches) == 1 + 6
    assert_warned_once(sst2, f"{disk}: No space left on device")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "Input/output error", "/a/file"), "/a/file: Input/output error"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "CUDA out of memory. Tried"),
    ],
    ids=["disk", "device"],
)
def test_an_error_while_caching_gives_one_warning(
    sst2: Workplace, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(path: Path, place: int, values: np.ndarray) -> None:
        raise error

    live = weights_of_run(sst2, "live", cache_teacher_states=False)
    monkeypatch.setattr(cached_states, "write_values", fail)
    assert_same_weights(weights_of_run(sst2, "once"), live)
    assert_warned_once(sst2, reason)
    assert entries(sst2) == []


def test_an_interrupted_run_leaves_no_cache_entry(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, place: int, values: np.ndarray) -> None:
        assert len(entries(sst2)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(cached_states, "write_values", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sst2.run(**flags(sst2, "model"))
    assert entries(sst2) == []


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


def test_a_killed_run_leaves_no_entry_that_another_would_use(sst2: Workplace) -> None:
    live = weights_of_run(sst2, "live", cache_teacher_states=False)
    done = command("-c", KILLED, *sst2.flags(**flags(sst2, "killed")), cwd=sst2.folder)
    assert done.status == -signal.SIGKILL
    (begun,) = entries(sst2)
    assert begun.name.startswith("making-")
    assert_close_weights(weights_of_run(sst2, "once"), live)
    (entry,) = entries(sst2)
    assert len(entry.name) == 32  # the incomplete one is removed


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_and_read_the_entry_of_one(sst2: Workplace, batches: list[int]) -> None:
    one = weights_of_run(sst2, "one")
    (entry,) = entries(sst2)
    expected = {file.name: file.read_bytes() for file in entry.iterdir()}
    elsewhere = sst2.folder / "elsewhere"
    runs = [
        flags(sst2, "computed", cache_dir=elsewhere, train_batch_size=4),
        flags(sst2, "found", train_batch_size=4),
        flags(sst2, "refused", train_batch_size=4, cache_limit=1e-5),
    ]
    settings = [{"flags": sst2.flags(**run), "gradients": str(sst2.folder / "gradients")} for run in runs]
    run_in_processes(settings, sst2.folder, 2)
    alone = weights_of_run(sst2, "alone", train_batch_size=4)
    for name in ("computed", "found", "refused"):
        assert_close_weights(read_bin(sst2.folder / name), alone)
    (entry,) = (elsewhere / "teacher_states").iterdir()
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == expected
    batches.clear()
    assert_same_weights(weights_of_run(sst2, "by one", cache_dir=elsewhere), one)
    assert batches == []


def process_with_less_room(rank: int, store: str, arguments: list[str]) -> None:
    """Train as one of two processes; the second can write no file of more than 4 kB."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    train(parse_options(arguments, main.ENTRY), Process(torch.device("cpu"), rank, 2))
    distributed.barrier()
    os._exit(0)


def test_no_process_caches_states_if_one_cannot_write(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    live = weights_of_run(sst2, "live", cache_teacher_states=False)
    arguments = sst2.flags(**flags(sst2, "once"))
    context = multiprocessing.get_context("spawn")
    given = str(sst2.folder / "store"), arguments
    processes = [context.Process(target=process_with_less_room, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert_close_weights(read_bin(sst2.folder / "once"), live)
    assert entries(sst2) == []


def test_padding_max_length_and_no_teacher_cache_are_refused(sst2: Workplace) -> None:
    assert "--padding max_length" in sst2.fails(cache_teacher_states=True)
    message = sst2.fails(**flags(sst2, "model", no_teacher_cache=True))
    assert "--cache_teacher_states and --no_teacher_cache: give one of them" in message


@pytest.mark.parametrize("stage", [{"pred_distill": True}, {"do_finetune": True, "student_model": None}], ids=str)
def test_the_flag_has_no_effect_in_other_stages(sst2: Workplace, stage: dict[str, Any]) -> None:
    without = weights_of_run(sst2, "without", **stage, cache_teacher_states=False)
    for padding in ("longest", "max_length"):
        weights = weights_of_run(sst2, padding, **stage, padding=padding)
        if padding == "longest":
            assert_same_weights(weights, without)
    assert entries(sst2) == []


def test_cached_states_are_those_of_each_example_alone(sst2: Workplace) -> None:
    """For any order of the batch; the states of padding are 0."""
    teacher = TinyBertForSequenceClassification.from_pretrained(sst2.teacher).eval()
    golden, options = Golden("sst2_small"), parse_options(sst2.flags(**flags(sst2, "model")), main.ENTRY)
    ids, segments, mask = (tensor.numpy() for tensor in golden.inputs())
    lengths = mask.sum(axis=1)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    firsts = (mask * (1 - segments)).sum(axis=1)
    features = Features(ids[mask == 1].astype(np.int32), ends, firsts, np.zeros(len(ids), dtype=np.int64))
    collator, layers = Collator(False, golden.case["max_seq_length"]), (0, 2, 6)
    predictor = Predictor(collator, options.eval_batch_size, Process(torch.device("cpu")), Precision())
    query = TeacherQuery(teacher, "weights", features, predictor, Cache(sst2.folder / "states", 10**9))
    cached = Teacher(teacher, cached_states=load_or_compute_states(query, (layers, (6, 2))))
    examples = np.array([5, 0, 7, 3])
    output = cached.states(cached.add_cached_states(collator.collate(features, examples)), layers, (6, 2))
    for row, example in enumerate(examples):
        alone = Teacher(teacher).states(collator.collate(features, examples[row : row + 1]), layers, (6, 2))
        n = lengths[example]
        for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, :n], theirs[0])
            assert not ours[row, n:].any()
        for ours, theirs in zip(output.attention_scores, alone.attention_scores, strict=True):
            torch.testing.assert_close(ours[row, :, :n, :n], theirs[0])
            assert not ours[row, :, n:].any()
            assert not ours[row, :, :, n:].any()


def test_a_file_of_another_size_is_computed_again(sst2: Workplace, batches: list[int]) -> None:
    weights_of_run(sst2, "first")
    (entry,) = entries(sst2)
    expected = (entry / "scores.npy").read_bytes()
    np.save(entry / "scores.npy", np.zeros(5, dtype=np.float32))
    batches.clear()
    weights_of_run(sst2, "second")
    assert batches
    assert (entry / "scores.npy").read_bytes() == expected
