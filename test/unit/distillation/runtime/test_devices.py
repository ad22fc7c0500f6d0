"""--device npu in whole runs on a stand-in device, process settings of memory and floating point.

The stand-in (`stand_in_npu.py`) computes on the CPU, so the weights must equal those of a run with --device cpu.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from cases import Run, Workplace, assert_same_weights, command, read_bin, report_lack

# main.py on the CPU with the operations of an accelerator: the order of the sums is another one in the CPU's own.
ON_CPU = """
import sys
import main
from distillation.launch import run_entry
from distillation.training import trainer
from transformer import layers, optimization, packed_inference
layers.has_cpu_kernels = optimization.can_fuse = lambda *_: False
packed_inference.can_pack = lambda: False
trainer.has_few_words_per_step = lambda *_: False
sys.exit(run_entry("main.py", main.main))
"""


STAND_IN = Path(__file__).parents[2] / "stand_in_npu.py"


def run_on_npu(place: Workplace, **changes: object) -> tuple[Run, list[str]]:
    """Run main.py on the stand-in; return its result and the calls of torch.npu."""
    log = place.folder / "calls.txt"
    flags = place.flags(**{"device": "npu", **changes})
    done = command(str(STAND_IN), str(log), *flags, cwd=place.folder, OMP_NUM_THREADS="1")
    return done, log.read_text(encoding="utf-8").split("\n") if log.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"padding": "longest"},
        {"pred_distill": True, "gradient_accumulation_steps": 2},
        # No weight is used twice in this stage: torch.autocast may add the gradients of such in bf16.
        {"pred_distill": True, "amp": True, "amp_dtype": "bf16", "opt_level": "O1"},
        {"amp": True, "amp_dtype": "fp16", "opt_level": "O2", "loss_scale": "dynamic"},
    ],
    ids=["intermediate", "prediction", "O1", "O2"],
)
def test_a_run_on_an_accelerator_gives_the_weights_of_one_on_a_cpu(sst2: Workplace, changes: dict[str, object]) -> None:
    settings = {"train_batch_size": 5, "num_train_epochs": 3, "learning_rate": 5e-4, "cache_limit": 0, **changes}
    flags = sst2.flags(**settings, output_dir=sst2.folder / "cpu", fps_acc_dir=sst2.folder / "cpu_logs")
    done = command("-c", ON_CPU, *flags, cwd=sst2.folder, OMP_NUM_THREADS="1")
    assert done.status == 0, done.err
    done, calls = run_on_npu(sst2, **settings)
    assert done.status == 0, done.err
    assert "on npu:0" in done.out
    # Both are processes of one thread, which compute with the same kernels.
    assert_same_weights(read_bin(sst2.model), read_bin(sst2.folder / "cpu"))
    (log,) = sst2.output.glob("train_full_1p_*.txt")
    assert log.read_text(encoding="utf-8").startswith("[NPU:0]  epoch 0 step0 FPS")
    assert {"set_device 0", "manual_seed_all 42", "synchronize"} <= set(calls)


def test_auto_prefers_the_npu_and_device_list_gives_its_id(sst2: Workplace) -> None:
    """Trap 3: `--device_list 1` is the second device, not the first of one."""
    done, calls = run_on_npu(sst2, do_eval=True, device="auto", device_list="1")
    assert done.status == 0, done.err
    assert "set_device 1" in calls
    assert "set_device 0" not in calls
    assert (sst2.output / "train_eval_1p.txt").read_text(encoding="utf-8").startswith("[NPU:1]")


def test_ids_beyond_the_number_of_devices_are_one_line(sst2: Workplace) -> None:
    done, _ = run_on_npu(sst2, device_list="0,1,2,3,4,5,6,7")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "--device_list 0,1,2,3,4,5,6,7" in done.err
    assert "2 of these devices" in done.err
    assert not sst2.output.exists()


@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_reused_unless_the_user_set_malloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kept: bool
) -> None:
    """Page faults show it: after some tensors of 100 MB, a further one needs no new pages."""
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


@pytest.mark.parametrize("as_an_entry", [True, False])
def test_an_entry_sets_denormal_numbers_to_0_in_all_threads(tmp_path: Path, as_an_entry: bool) -> None:
    program = (
        "import torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from distillation.launch import run_entry\n"
        "torch.set_num_threads(4)\n"
        "def nonzero(): return int((torch.full((4_000_000,), 1e-39) * 0.9).count_nonzero())\n"
        "def entry(flags):\n"
        "    with ThreadPoolExecutor(1) as pool: print(nonzero(), pool.submit(nonzero).result())\n"
        f"run_entry('main.py', entry) if {as_an_entry} else entry([])\n"
    )
    done = command("-c", program, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out.split() == (["0", "0"] if as_an_entry else ["4000000"] * 2)
