"""--device npu, taken through whole runs on a stand-in device that torch itself is told of.

The stand-in (`stand_in_npu.py`) computes on the CPU, so weights must equal those of the same run with
--device cpu: what differs is every line of this project that a device goes through.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import Golden, Run, Workplace, assert_same_weights, call, command, read_bin, report_lack

STAND_IN = Path(__file__).parents[2] / "stand_in_npu.py"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Golden("sst2_small").workplace(tmp_path)


def on_npu(place: Workplace, **changes: object) -> tuple[Run, list[str]]:
    """main.py with --device npu, and what it called of torch.npu."""
    log = place.folder / "calls.txt"
    threads = str(torch.get_num_threads())  # as in this process: a sum's order follows from their number
    flags = place.flags(device="npu", **changes)
    done = command(str(STAND_IN), str(log), *flags, cwd=place.folder, OMP_NUM_THREADS=threads)
    return done, log.read_text(encoding="utf-8").split("\n") if log.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"padding": "longest"},
        {"pred_distill": True, "gradient_accumulation_steps": 2},
        # The prediction stage, where no weight is used twice: torch.autocast may add up such gradients in bf16.
        {"pred_distill": True, "amp": True, "amp_dtype": "bf16", "opt_level": "O1"},
        {"amp": True, "amp_dtype": "fp16", "opt_level": "O2", "loss_scale": "dynamic"},
    ],
    ids=["intermediate", "prediction", "O1", "O2"],
)
def test_a_whole_run_equals_the_cpus(
    place: Workplace, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages, fp32 and mixed precision: the same weights, and the logs name the device."""
    settings = {"train_batch_size": 5, "num_train_epochs": 3, "learning_rate": 5e-4, **changes}
    # The CPU takes the accelerator's way through model and optimizer: its own ones round elsewhere.
    monkeypatch.setattr("transformer.modeling._has_cpu_kernels", lambda _: False)
    monkeypatch.setattr("transformer.optimization._can_fuse", lambda _: False)
    monkeypatch.setattr("transformer.packed_inference.can_pack", lambda: False)
    monkeypatch.setattr("distillation.training.trainer._meets_few", lambda *_: False)
    place.run(**settings, output_dir=place.folder / "cpu", fps_acc_dir=place.folder / "cpu_logs")
    done, calls = on_npu(place, **settings)
    assert done.status == 0, done.err
    assert "on npu:0" in done.out
    ours, theirs = read_bin(place.model), read_bin(place.folder / "cpu")
    assert_same_weights(ours, theirs)  # the stand-in computes by the same kernels, in the same order
    (log,) = place.output.glob("train_full_1p_*.txt")
    assert log.read_text(encoding="utf-8").startswith("[NPU:0]  epoch 0 step0 FPS")
    assert "set_device 0" in calls
    assert "manual_seed_all 42" in calls
    assert "synchronize" in calls  # a clock is read only when the device has done its work


def test_the_id_is_honoured(place: Workplace) -> None:
    """Trap 3: `--device_list 1` is the second card, not the first of one."""
    done, calls = on_npu(place, do_eval=True, device_list="1")
    assert done.status == 0, done.err
    assert "set_device 1" in calls
    assert "set_device 0" not in calls
    assert (place.output / "train_eval_1p.txt").read_text(encoding="utf-8").startswith("[NPU:1]")


def test_more_ids_than_devices(place: Workplace) -> None:
    """One line tells how many there are; nothing is written."""
    done, _ = on_npu(place, device_list="0,1,2,3,4,5,6,7")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "--device_list 0,1,2,3,4,5,6,7: this machine has 2 of these devices" in done.err
    assert not place.output.exists()


def test_auto_prefers_the_npu(place: Workplace) -> None:
    """--device auto is npu, else gpu, else cpu."""
    log = place.folder / "calls.txt"
    done = command(str(STAND_IN), str(log), *place.flags(device="auto", do_eval=True), cwd=place.folder)
    assert done.status == 0, done.err
    assert (place.output / "train_eval_1p.txt").read_text(encoding="utf-8").startswith("[NPU:0]")


@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_that_tensors_free_is_kept_for_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kept: bool
) -> None:
    """Page faults show it: a tensor of 100 MB needs no new pages in the end. A user's own settings go first.

    It takes a few tensors: glibc keeps the small pieces beside the first seven apart, so theirs are not whole again.
    How many faults the first one costs depends on the size of the system's pages.
    """
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    program = (
        "import resource, torch\n"
        "from distillation.runtime.device import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "faults = []\n"
        "for _ in range(20):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(25_000_000)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "print(faults[0], faults[-1])\n"
    )
    done = command("-c", program, cwd=tmp_path, **environment)
    assert done.status == 0, done.err
    first, last = map(int, done.out.split())
    if platform.libc_ver()[0] != "glibc" or not first:
        report_lack("glibc's settings for freed memory, or a count of page faults")
        return
    assert (last < first / 4) is kept


@pytest.mark.parametrize("prepared", [True, False])
def test_numbers_too_small_for_full_speed_are_0_in_all_threads(tmp_path: Path, prepared: bool) -> None:
    program = (
        "import main, torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from distillation.runtime.device import prepare_process\n"
        f"if {prepared}: prepare_process()\n"
        "torch.set_num_threads(4)\n"
        "def left(): return int((torch.full((4_000_000,), 1e-39) * 0.9).count_nonzero())\n"
        "with ThreadPoolExecutor(1) as pool: print(left(), pool.submit(left).result())\n"
    )
    done = command("-c", program, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out.split() == (["0", "0"] if prepared else ["4000000"] * 2)


def test_an_entry_takes_tiny_numbers_for_0() -> None:
    def entry(flags: Sequence[str]) -> None:
        print(int((torch.full((100,), 1e-39) * 0.9).count_nonzero()))

    assert call(entry, []).out == "0\n"
