"""Several processes make the same steps as one, and end together.

Equality is tried with gloo on the CPU; each number of processes is started once and does all runs
(`several_runs.py`). How processes are started (spawned, torchrun) has its own few tests below.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ROOT, Golden, Workplace, command, edit_config, read_bin

from data_processing.batching import Collator, TrainingPlan
from distillation.runtime.device import Process, choose_device, seed_process, share_cores
from transformer.errors import UserError

HERE = Path(__file__).parents[2]
STEPS = 20
BATCH = 5  # of 8 or 9 rows: every epoch has a short last step
SETTINGS = list(itertools.product(("intermediate", "prediction"), ("longest", "max_length"), (1, 2)))


def flags_of(place: Workplace, name: str, stage: str, padding: str, accumulation: int) -> list[str]:
    return place.flags(
        output_dir=place.folder / name,
        padding=padding,
        gradient_accumulation_steps=accumulation,
        pred_distill=stage == "prediction",
        train_batch_size=BATCH,
        num_train_epochs=STEPS // 2,
        learning_rate=5e-4,
        group_by_length=True,  # sorted: one process gets the short texts, another the long ones
        eval_step=1000,
    )


def run_in_processes(runs: list[dict[str, Any]], folder: Path, count: int) -> None:
    """Does the runs in `count` processes; fails where one of them fails."""
    file = folder / f"runs_{count}.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [sys.executable, str(HERE / "several_runs.py"), str(file), str(folder / f"store_{count}")]
    processes = [
        subprocess.Popen(
            [*arguments, str(rank), str(count)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()


@pytest.fixture(scope="module", params=["sst2_small", "mnli_small"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Any]:
    """(processes, stage, padding, accumulation) -> weights after 20 steps, gradients of the first."""
    folder = tmp_path_factory.mktemp(request.param)
    place = Golden(request.param).workplace(folder)
    found = {}
    for count in (1, 2, 4):
        names = {setting: "_".join(map(str, (count, *setting))) for setting in SETTINGS}
        runs = [
            {"flags": flags_of(place, name, *setting), "gradients": str(folder / f"{name}.pt")}
            for setting, name in names.items()
        ]
        run_in_processes(runs, folder, count)
        for setting, name in names.items():
            gradients = torch.load(folder / f"{name}.pt", weights_only=True)
            found[(count, *setting)] = read_bin(folder / name), gradients
    return found


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
@pytest.mark.parametrize("count", [2, 4])
def test_processes_make_the_steps_of_one(outcomes: dict[tuple[Any, ...], Any], count: int, setting: tuple) -> None:
    """Same total batch: weights equal to 1e-6 after 20 steps, and the first step's gradients to 1e-5."""
    stage, padding, _ = setting
    expected, expected_gradients = outcomes[1, stage, padding, 1]
    weights, gradients = outcomes[(count, *setting)]
    assert weights.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], atol=1e-6, rtol=0)
    assert [g.is_sparse for g in gradients].count(True) == 1, "of the word embeddings rows alone are exchanged"
    largest = max(float(g.norm()) for g in expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # A key's bias adds the same to all scores of a row, so logits do not depend on it: in the prediction
        # stage its gradient is rounding alone, and there is nothing that two runs could agree on.
        if float(theirs.norm()) > 1e-6 * largest:
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    compared = sum(float(g.norm()) > 1e-6 * largest for g in expected_gradients)
    assert compared >= len(expected_gradients) - (3 if stage == "prediction" else 0)


def test_the_runs_above_give_processes_unequal_work() -> None:
    """The equality above is worth something: one process's tokens are twice another's, and some have no example."""
    case = Golden("sst2_small")
    lengths = case.figures["feat_input_mask"].sum(axis=1)
    padding = Collator(False, case.case["max_seq_length"])

    def tokens(count: int) -> list[list[int]]:
        plans = [
            TrainingPlan(lengths, BATCH, padding, 42, 1, rank, count, group_by_length=True) for rank in range(count)
        ]
        return [
            [int(lengths[np.concatenate(step.micro_batches)].sum()) for step in steps]
            for steps in zip(*(plan.epoch(0) for plan in plans), strict=True)
        ]

    assert any(max(step) >= 2 * min(step) for step in tokens(2))
    assert any(0 in step for step in tokens(4))


@pytest.mark.slow
class TestStarting:
    """Spawned processes and torchrun's."""

    def test_torchrun_equals_spawned(self, tmp_path: Path) -> None:
        """The same command, with two ids and under torchrun, gives the same weights, dropout's draws included."""
        place = Golden("sst2_small").workplace(tmp_path)
        edit_config(place.student, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        common = {"train_batch_size": BATCH, "num_train_epochs": 3, "pred_distill": True, "padding": "longest"}
        spawned = command(
            str(ROOT / "main.py"),
            *place.flags(**common, device_list="0,1", output_dir=tmp_path / "spawned"),
            cwd=tmp_path,
        )
        assert spawned.status == 0, spawned.err
        flags = place.flags(**common, output_dir=tmp_path / "torchrun", fps_acc_dir=tmp_path / "output_torchrun")
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        run = command(*torchrun, str(ROOT / "main.py"), *flags, cwd=tmp_path)
        assert run.status == 0, run.err
        ours, theirs = read_bin(tmp_path / "spawned"), read_bin(tmp_path / "torchrun")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert [p.name for p in sorted((tmp_path / "output_torchrun").glob("*.txt"))] == ["train_full_2p_2.txt"]
        assert run.out.count("the model is in") == 1  # only the first process speaks
        check_two_process_logs(place)

    def test_a_users_mistake_is_told_once(self, tmp_path: Path) -> None:
        """Four processes meet it, one line tells of it, and nothing is written."""
        place = Golden("sst2_small").workplace(tmp_path)
        done = command(str(ROOT / "main.py"), *place.flags(device_list="0,1,2,3", aug_train=True), cwd=tmp_path)
        assert done.status == 2
        assert done.err.count("\n") == 1
        assert "train_aug.tsv: not found" in done.err
        assert not place.model.exists()
        assert not place.output.exists()

    def test_all_end_when_one_is_killed(self, tmp_path: Path) -> None:
        """SIGKILL to one of three: the run ends within seconds, says which and how, once, and leaves no process."""
        place = Golden("sst2_small").workplace(tmp_path)
        flags = place.flags(device_list="0,1,2", num_train_epochs=1_000_000)
        run = start(flags, tmp_path)
        victims = children_in_training(run.pid, place, 3)
        os.kill(victims[1], signal.SIGKILL)
        begin = time.monotonic()
        _, errors = run.communicate(timeout=60)
        assert time.monotonic() - begin < 30
        assert run.returncode == 1
        assert errors.count("was killed by SIGKILL; all processes were ended") == 1
        assert "Traceback" not in errors
        assert not any(alive(pid) for pid in victims)

    def test_children_do_not_outlive_their_parent(self, tmp_path: Path) -> None:
        """SIGKILL to the command itself: what it spawned ends by itself."""
        place = Golden("sst2_small").workplace(tmp_path)
        run = start(place.flags(device_list="0,1", num_train_epochs=1_000_000), tmp_path)
        children = children_in_training(run.pid, place, 2)
        run.kill()
        run.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in children)

    @pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node", "2"]])
    def test_processes_of_a_group_leave_without_pythons_end(self, tmp_path: Path, launcher: list[str]) -> None:
        """Python's end takes the interpreter from gloo's threads, which now and then is a SIGABRT: none comes to it."""
        place = Golden("sst2_small").workplace(tmp_path / "place")
        (tmp_path / "sitecustomize.py").write_text(
            "import atexit, os, sys\n"
            "if '--multiprocessing-fork' in sys.orig_argv or 'RANK' in os.environ:\n"
            "    atexit.register(os.abort)\n",
            encoding="utf-8",
        )
        port = ["--master_port", str(free_port())] if launcher else []
        ids = {} if launcher else {"device_list": "0,1"}
        done = command(
            *launcher, *port, str(ROOT / "main.py"), *place.flags(**ids), cwd=tmp_path, PYTHONPATH=str(tmp_path)
        )
        assert done.status == 0, done.err
        assert done.out.count("the model is in") == 1

    def test_processes_of_torchrun_that_fail_leave_so_too(self, tmp_path: Path) -> None:
        """Each tells by its status alone; the mistake is met after the processes have exchanged something."""
        place = Golden("sst2_small").workplace(tmp_path / "place")
        (tmp_path / "sitecustomize.py").write_text(
            "import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(print, 'Python came to its end')\n",
            encoding="utf-8",
        )
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        done = command(
            *torchrun,
            str(ROOT / "main.py"),
            *place.flags(aug_train=True),
            cwd=tmp_path,
            PYTHONPATH=str(tmp_path),
        )
        assert done.err.count("train_aug.tsv: not found") == 1
        assert "Python came to its end" not in done.out

    def test_a_port_in_use_is_told(self, tmp_path: Path) -> None:
        place = Golden("sst2_small").workplace(tmp_path)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert f"--port {port}: cannot be listened on" in place.fails(device_list="0,1", port=port)


def check_two_process_logs(place: Workplace) -> None:
    """With two processes: one line a step, examples counted once, the schedule as long as the steps taken."""
    steps = place.events("train")
    per_epoch = -(-8 // BATCH)
    assert [event["step"] for event in steps] == list(range(1, 3 * per_epoch + 1))
    # Trap 5: the rate rises over a tenth of the steps really taken and ends one step above 0.
    rates = [event["learning_rate"] / 5e-5 for event in steps]
    total = len(steps)
    progress = np.arange(total) / total
    expected = np.where(progress < 0.1, progress / 0.1, (1 - progress) / 0.9)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # Trap 16: FPS counts each example once, not once for each process.
    (end,) = place.events("end")
    assert end["fps_examples"] == 3 * 8
    # Trap 14: the evaluation that two processes share sees every example once, with its own label.
    (evaluation,) = place.events("eval")
    place.run(
        do_eval=True, student_model=place.folder / "spawned", padding="longest", output_dir=place.folder / "alone"
    )
    alone = place.events("eval")[-1]
    assert evaluation["acc"] == alone["acc"]
    assert evaluation["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
    lines = (place.output / "train_full_2p_2.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == total
    assert lines[0].startswith("[CPU:0]  epoch 0 step0 FPS")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(flags: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags],
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_in_training(pid: int, place: Workplace, count: int) -> list[int]:
    """The spawned processes' ids, in the order of their ranks, once the first step is logged."""
    log, deadline = place.output / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and '"event": "train"' in log.read_text(encoding="utf-8"):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
            spawned = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
            assert len(spawned) == count
            return spawned
        time.sleep(0.2)
    raise AssertionError("training did not begin")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1][:3]
    except FileNotFoundError:
        return False


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    """--device gpu and npu on a machine without: one line each; auto finds the CPU."""
    assert choose_device("auto") == "cpu"
    for name in ("gpu", "npu"):
        with pytest.raises(UserError, match=f"--device {name}: there is none here"):
            choose_device(name)
    assert "--device gpu" in Golden("sst2_small").workplace(tmp_path).fails(device="gpu")


def test_threads_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process gets its part of the cores and at least one thread; what the user set goes first."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert share_cores(1) == cores
    assert share_cores(cores) == 1
    assert share_cores(10 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_cores(2) == 3


def test_processes_draw_different_dropout() -> None:
    """Trap 4: each process is seeded, by its rank; the same rank draws the same again."""

    def draw(rank: int) -> torch.Tensor:
        seed_process(42, rank)
        return torch.nn.functional.dropout(torch.ones(100), 0.5)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_together_passes_on_nothing_when_all_is_well() -> None:
    process = Process(torch.device("cpu"))
    with process.raise_on_all_ranks():
        pass
    with pytest.raises(UserError, match="mine"), process.raise_on_all_ranks():
        raise UserError("mine")
