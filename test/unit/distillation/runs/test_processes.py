"""Several processes train the same weights as one, and end together.

Weights are compared on the CPU with gloo; each number of processes is started once for all runs (`several_runs.py`).
`TestStarting` starts processes as a user does: spawned, or by torchrun.
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
    """Do the runs in `count` processes; fail if one of them fails."""
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
    """Return (weights after 20 steps, gradients of the first) by (processes, stage, padding, accumulation)."""
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
def test_several_processes_give_the_weights_and_gradients_of_one(
    outcomes: dict[tuple[Any, ...], Any], count: int, setting: tuple
) -> None:
    """Same total batch: weights equal to 1e-6 after 20 steps, and the first step's gradients to 1e-5."""
    stage, padding, _ = setting
    expected, expected_gradients = outcomes[1, stage, padding, 1]
    weights, gradients = outcomes[(count, *setting)]
    assert weights.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], atol=1e-6, rtol=0)
    assert [g.is_sparse for g in gradients].count(True) == 1, (
        "only the rows of the word embeddings that were used are exchanged"
    )
    largest = max(float(g.norm()) for g in expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # A key's bias adds the same to all scores of a row, so logits do not depend on it: in the prediction
        # stage its gradient is a rounding error, which differs between runs.
        if float(theirs.norm()) > 1e-6 * largest:
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    compared = sum(float(g.norm()) > 1e-6 * largest for g in expected_gradients)
    assert compared >= len(expected_gradients) - (3 if stage == "prediction" else 0)


def test_the_compared_runs_give_processes_unequal_numbers_of_tokens() -> None:
    """One process has at least twice the tokens of another in a step, and some processes have no example."""
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
    """Processes that main.py spawns, and those of torchrun."""

    def test_torchrun_gives_the_weights_of_spawned_processes(self, tmp_path: Path) -> None:
        """With dropout: its random numbers are the same too."""
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
        assert run.out.count("the model is in") == 1  # only the first process prints
        check_two_process_logs(place)

    def test_a_mistake_in_four_processes_is_one_line(self, tmp_path: Path) -> None:
        """All four processes find the mistake; nothing is written."""
        place = Golden("sst2_small").workplace(tmp_path)
        done = command(str(ROOT / "main.py"), *place.flags(device_list="0,1,2,3", aug_train=True), cwd=tmp_path)
        assert done.status == 2
        assert done.err.count("\n") == 1
        assert "train_aug.tsv: not found" in done.err
        assert not place.model.exists()
        assert not place.output.exists()

    def test_all_processes_end_when_one_is_killed(self, tmp_path: Path) -> None:
        """SIGKILL to one of three: the run ends within 30 seconds with one message and leaves no process."""
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
        """SIGKILL to the command: the processes that it spawned end."""
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
    def test_processes_of_a_group_exit_without_pythons_finalization(self, tmp_path: Path, launcher: list[str]) -> None:
        """Finalization with running gloo threads sometimes ends in SIGABRT, so no process may reach it."""
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

    def test_failed_processes_of_torchrun_exit_without_pythons_finalization(self, tmp_path: Path) -> None:
        """The mistake is found after the processes have communicated; one of them prints it."""
        place = Golden("sst2_small").workplace(tmp_path / "place")
        (tmp_path / "sitecustomize.py").write_text(
            "import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(print, 'Python was finalized')\n",
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
        assert "Python was finalized" not in done.out

    def test_a_port_in_use_is_an_error(self, tmp_path: Path) -> None:
        place = Golden("sst2_small").workplace(tmp_path)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert f"--port {port}: cannot be listened on" in place.fails(device_list="0,1", port=port)


def check_two_process_logs(place: Workplace) -> None:
    """Check that two processes log one line per step, count examples once, and schedule the steps that are taken."""
    steps = place.events("train")
    per_epoch = -(-8 // BATCH)
    assert [event["step"] for event in steps] == list(range(1, 3 * per_epoch + 1))
    # Trap 5: the rate rises over a tenth of the steps that are taken and ends one step above 0.
    rates = [event["learning_rate"] / 5e-5 for event in steps]
    total = len(steps)
    progress = np.arange(total) / total
    expected = np.where(progress < 0.1, progress / 0.1, (1 - progress) / 0.9)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # Trap 16: FPS counts each example once, not once for each process.
    (end,) = place.events("end")
    assert end["fps_examples"] == 3 * 8
    # Trap 14: an evaluation by two processes has every example once, with its own label.
    evaluations = place.events("eval")
    assert [event["step"] for event in evaluations] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    evaluation = max(evaluations, key=lambda event: event["acc"])  # the first of the best, whose model was saved
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
    """Wait for the first logged step; return the ids of the spawned processes in the order of their ranks."""
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


def test_a_device_that_the_machine_lacks_is_an_error(tmp_path: Path) -> None:
    """auto chooses the CPU there."""
    assert choose_device("auto") == "cpu"
    for name in ("gpu", "npu"):
        with pytest.raises(UserError, match=f"--device {name}: there is none here"):
            choose_device(name)
    assert "--device gpu" in Golden("sst2_small").workplace(tmp_path).fails(device="gpu")


def test_cores_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has its share of the cores and at least one thread; OMP_NUM_THREADS has priority."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert share_cores(1) == cores
    assert share_cores(cores) == 1
    assert share_cores(10 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_cores(2) == 3


def test_processes_have_different_dropout() -> None:
    """Trap 4: each process is seeded by its rank; the same rank gives the same random numbers."""

    def draw(rank: int) -> torch.Tensor:
        seed_process(42, rank)
        return torch.nn.functional.dropout(torch.ones(100), 0.5)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_raise_on_all_ranks_raises_only_errors_of_its_block() -> None:
    process = Process(torch.device("cpu"))
    with process.raise_on_all_ranks():
        pass
    with pytest.raises(UserError, match="mine"), process.raise_on_all_ranks():
        raise UserError("mine")
