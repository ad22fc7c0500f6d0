"""Start the processes of a run, and print a user's mistake as one line.

One id in --device_list: this process does the run. Several: as many processes are spawned on this machine. Under
torchrun: this process is one of those that torchrun started, on this machine or on several.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException, start_processes
from tqdm import tqdm

from distillation.checkpoints.folder_state import check_writable
from distillation.fetch import fetch_addresses
from distillation.options import Options, Stage
from distillation.runs.predict import evaluate, predict
from distillation.runs.train import train
from distillation.runtime.console import show_messages
from distillation.runtime.device import (
    BACKENDS,
    Process,
    check_ids,
    choose_deterministic,
    choose_device,
    local_rank_zero_first,
    open_device,
    prepare_process,
    share_cores,
)
from distillation.runtime.signals import RunFailed, Signals, Stopped, blocked, exit_with_parent, leave
from transformer.errors import UserError

USER_ERROR_STATUS = 2
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_END = 3.0  # of the other processes when one fails; then SIGTERM, and after as long again SIGKILL
_MOST_CHARACTERS = 3500  # of a reported traceback: a pipe takes up to 4 KB at once or not at all, never a part

# The run of each stage, which every process calls.
RUNS: dict[Stage, Callable[[Options, Process, Signals], None]] = {
    Stage.FINETUNE: train,
    Stage.INTERMEDIATE: train,
    Stage.PREDICTION: train,
    Stage.EVALUATION: evaluate,
    Stage.PREDICTIONS: predict,
}


class LostPeer(RunFailed):
    """An exchange with another process failed: a consequence of that process's end, not the cause of the run's."""


def run_entry(prog: str, entry: Callable[[Sequence[str]], None]) -> int:
    """Run an entry on the command line's arguments; return the exit status.

    A UserError is printed to standard error as one line and gives status 2. A signal gives one line and 128 + its
    number. Any other exception is a fault of this project and keeps its traceback. Under torchrun only the first
    process of a machine prints what all of them meet.
    """
    prints = not _under_torchrun() or os.environ["LOCAL_RANK"] == "0"
    show_messages(enabled=not _under_torchrun() or os.environ["RANK"] == "0")
    prepare_process()
    status, line = 0, ""
    try:
        with Signals().handled():
            entry(sys.argv[1:])
    except UserError as error:
        status, line = USER_ERROR_STATUS, f"error: {error}" if prints else ""
    except Stopped as error:
        status, line = error.status, str(error) if prints else ""
    except RunFailed as error:
        status, line = 1, str(error)
    if line:
        tqdm.write(f"{prog}: {line}", file=sys.stderr)  # below a bar that the run leaves
    if _under_torchrun():
        leave(status)
    return status


def launch(options: Options) -> None:
    """Do the run that the options describe, in as many processes as they name.

    Raises:
        UserError: a flag names something that cannot be used.
        RunFailed: a process of the run died.
        Stopped: a signal ended the run.
    """
    if options.deterministic:
        choose_deterministic()
    kind = choose_device(options.device)
    signals = Signals()
    with signals.handled():
        if _under_torchrun():
            _run_under_torchrun(options, kind, signals)
            return
        check_ids(kind, options.device_list)
        _check_places_before_fetching(options, Process(torch.device("cpu")))
        options = fetch_addresses(options)
        if len(options.device_list) == 1:
            RUNS[options.stage](options, Process(open_device(kind, options.device_list[0])), signals)
        else:
            _spawn(options, kind, signals)


def _under_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN_VARIABLES)


def _run_under_torchrun(options: Options, kind: str, signals: Signals) -> None:
    """Do the run as the process that torchrun's environment describes."""
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    ids = tuple(range(local)) if options.device_list == (0,) else options.device_list
    if len(ids) < local:
        raise UserError(f"--device_list names {len(ids)} devices, torchrun has {local} processes on this machine")
    check_ids(kind, ids)
    # torchrun sets OMP_NUM_THREADS to 1 where the user has not set it, however many cores there are.
    torch.set_num_threads(share_cores(local, ignored="1" if local > 1 else ""))
    process = Process(open_device(kind, ids[local_rank]), rank, world_size, local_rank)
    distributed.init_process_group(BACKENDS[kind], device_id=process.device if kind == "cuda" else None)
    _run_in_group(options, process, signals)


def _run_in_group(options: Options, process: Process, signals: Signals) -> None:
    """Do the run as one process of a group, which is destroyed if the run ends well. Raises LostPeer."""
    try:
        if options.addresses:
            with process.raise_on_all_ranks():
                _check_places_before_fetching(options, process)
            options = local_rank_zero_first(
                process, partial(fetch_addresses, options, refresh=process.is_local_rank_zero)
            )
        RUNS[options.stage](options, process, signals)
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):  # gloo raises plain RuntimeErrors
            raise
        raise LostPeer(
            f"process {process.rank} ended because another process of the run did; what was saved stays"
        ) from None


def _check_places_before_fetching(options: Options, process: Process) -> None:
    """Check before a download that the run can write its outputs. Raises UserError."""
    if options.addresses and RUNS[options.stage] is train and process.is_main:
        check_writable(options, process.world_size)


def _spawn(options: Options, kind: str, signals: Signals) -> None:
    """Run one process for each id of --device_list; when one fails all are ended, and the first cause is raised.

    torch starts and joins the processes, and ends the others when one fails. It passes on a traceback of the process
    that it saw end first, or that process's exit status. So the processes send their exceptions through a queue
    besides: a user's mistake is one line, and a lost connection is not taken for the cause.
    """
    count = len(options.device_list)
    threads = share_cores(count)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # torch and tokenizers read them when first imported
        os.environ.setdefault(name, str(threads))
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # its warnings name each process it ends
    store = _open_store(options)
    reports = multiprocessing.get_context("spawn").SimpleQueue()
    children: list[BaseProcess] = []
    with signals.held(partial(_terminate, children)):
        with blocked():  # a signal during its imports would end a process without a report
            arguments = (options, kind, threads, store.port, reports)
            context = start_processes(_run_child, arguments, count, join=False, daemon=True, start_method="spawn")
            children += context.processes
        if signals.received:  # before the processes were started
            _terminate(children)
        try:
            while not context.join(grace_period=_SECONDS_TO_END):
                pass
        except ProcessExitedException as error:
            cause = _first_cause(error, children, reports)
            if signals.received and not isinstance(cause, UserError):
                cause = Stopped(signals.received, cause.where if isinstance(cause, Stopped) else "")
            raise cause from None
    if signals.received:  # too late to stop the processes; but a script must not continue as if there was no signal
        raise Stopped(signals.received, "when the run had ended")


def _terminate(children: Sequence[BaseProcess]) -> None:
    for child in children:
        child.terminate()


def _first_cause(error: ProcessExitedException, children: Sequence[BaseProcess], reports: Any) -> BaseException:
    """Return what went wrong first, after all processes have ended.

    Args:
        error: names the process that torch saw end first.
        reports: a queue of (rank, exception), in the order in which they were sent.
    """
    reported: dict[int, BaseException] = {}
    while not reports.empty():
        rank, cause = reports.get()
        reported[rank] = cause
    silent = [rank for rank, child in enumerate(children) if child.exitcode and rank not in reported]
    if error.error_index not in silent:
        causes = [cause for cause in reported.values() if not isinstance(cause, LostPeer)]
        if causes or not silent:
            return (causes or list(reported.values()))[0]
    rank = error.error_index if error.error_index in silent else silent[0]
    status = children[rank].exitcode or 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return RunFailed(f"process {rank} {how}; all processes were ended")


def _open_store(options: Options) -> distributed.TCPStore:
    """Return the store through which the processes find each other: on --port, or on a free one.

    Raises:
        UserError: another program listens there, or the address is not this machine's.
    """
    try:
        with socket.socket() as probe:  # the store itself would share a port with a program that listens on one address
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as after a run that has just ended
            probe.bind((options.addr, options.port or 0))
        return distributed.TCPStore(options.addr, options.port or 0, is_master=True, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        where = f"--addr {options.addr}" + (f" --port {options.port}" if options.port else "")
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: cannot be listened on ({reason}); give another one") from None


def _run_child(rank: int, options: Options, kind: str, threads: int, port: int, reports: Any) -> None:
    """Do the run as a spawned process, which reports an exception to its parent and prints none.

    It leaves at once, since its peers may wait for it and the end of Python for them.
    """
    exit_with_parent()
    show_messages(enabled=rank == 0)
    prepare_process()
    signals = Signals()
    cause: BaseException
    try:
        with signals.handled():
            if options.deterministic:
                choose_deterministic()
            torch.set_num_threads(threads)
            if kind == "cpu" and sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are on this machine
            process = Process(open_device(kind, options.device_list[rank]), rank, len(options.device_list))
            store = distributed.TCPStore(options.addr, port, is_master=False)
            distributed.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=process.world_size)
            _run_in_group(options, process, signals)
            leave()  # here, where a signal still gives a report
    except (UserError, Stopped, LostPeer) as error:
        cause = error
    except BaseException:
        fault = traceback.format_exc()[-_MOST_CHARACTERS:]
        cause = RunFailed(f"process {rank} failed; all processes were ended\n{fault}")
    reports.put((rank, cause))
    leave(1)
