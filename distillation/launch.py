"""Starts a run: makes the processes that the flags ask for, and turns a user's mistake into one line.

One id in --device_list: this process. Several: as many processes are spawned on this machine. Under
torchrun: this process is one of those that torchrun made, here or on several machines.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, NoReturn

import torch
from torch import distributed

from distillation.fetch import fetch_addresses
from distillation.options import Options, Stage
from distillation.runs import train
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
from distillation.runtime.logs import show_messages
from distillation.runtime.signals import Signals, Stopped, deferred
from transformer.errors import UserError

USER_ERROR_STATUS = 2
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_FAIL_TOGETHER = 1.0
_SECONDS_TO_END = 5.0


class RunFailed(Exception):
    """A process of the run died; the message says which and how, a traceback included where there is one."""


class Report(NamedTuple):
    """What a spawned process says when it does not end well: a line or a traceback, and with which status it ends.

    kind: `mistake`, a user's; `signal`; or `fault`.
    """

    kind: str
    text: str
    status: int


def run_entry(prog: str, entry: Callable[[Sequence[str]], None]) -> int:
    """Runs an entry on the command line's arguments; returns the exit status.

    A UserError is printed to standard error as one line and gives 2; of torchrun's processes on a
    machine, which all meet the same one, only the first prints it. Any other exception is a fault of
    this project and keeps its traceback. A signal that ends the run gives one line and 128 + its number.
    """
    show_messages(enabled=not _under_torchrun() or os.environ["RANK"] == "0")
    prepare_process()
    try:
        with Signals().handled():
            entry(sys.argv[1:])
        status = 0
    except UserError as error:
        status = USER_ERROR_STATUS
        if not _under_torchrun() or os.environ["LOCAL_RANK"] == "0":
            print(f"{prog}: error: {error}", file=sys.stderr)
    except Stopped as error:
        status = error.status
        if not _under_torchrun() or os.environ["LOCAL_RANK"] == "0":
            print(f"{prog}: {error}", file=sys.stderr)
    except RunFailed as error:
        status = 1
        print(f"{prog}: {error}", file=sys.stderr)
    if _under_torchrun():
        leave(status)
    return status


def leave(status: int = 0) -> NoReturn:
    """Ends this process, which took part in a group of processes, at once, what it printed flushed.

    Python's own end takes the interpreter down while gloo's threads still run, for what holds the model holds
    the group too. One that then lets go of the tensors of its last exchange calls std::terminate: a SIGABRT
    after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(options: Options) -> None:
    """Runs what the options ask for, in as many processes as they name, to the end.

    Raises:
        UserError: what the flags name cannot be used.
        RunFailed: a process of the run died.
        Stopped: a signal ended it.
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
            train.run(options, Process(open_device(kind, options.device_list[0])), signals)
        else:
            _spawn(options, kind, signals)


def _under_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN_VARIABLES)


def _run_under_torchrun(options: Options, kind: str, signals: Signals) -> None:
    """Runs as the process that torchrun's environment describes."""
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    ids = tuple(range(local)) if options.device_list == (0,) else options.device_list
    if len(ids) < local:
        raise UserError(f"--device_list names {len(ids)} devices, torchrun has {local} processes on this machine")
    check_ids(kind, ids)
    # Where the user sets nothing torchrun tells each process to use one thread, however many cores there are.
    torch.set_num_threads(share_cores(local, ignored="1" if local > 1 else ""))
    process = Process(open_device(kind, ids[local_rank]), rank, world_size, local_rank)
    distributed.init_process_group(BACKENDS[kind], device_id=process.device if kind == "cuda" else None)
    try:
        if options.addresses:
            with process.raise_on_all_ranks():
                _check_places_before_fetching(options, process)
            options = local_rank_zero_first(
                process, partial(fetch_addresses, options, refresh=process.is_local_rank_zero)
            )
        train.run(options, process, signals)
    except RuntimeError as error:
        if not _is_of_a_connection(error):
            raise
        raise RunFailed(f"process {rank} ends, for another one of the run has; what was saved stays") from None
    distributed.destroy_process_group()  # where a process fails its end does that


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed: gloo's errors are of no type of their own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _check_places_before_fetching(options: Options, process: Process) -> None:
    """A download is for nothing where the run cannot write what it makes. Raises UserError."""
    if options.addresses and options.stage in (Stage.INTERMEDIATE, Stage.PREDICTION, Stage.FINETUNE):
        train.check_places(options, process)


def _spawn(options: Options, kind: str, signals: Signals) -> None:
    """Runs one process for each id of --device_list; when one fails all are ended, and the cause is raised once."""
    count = len(options.device_list)
    threads = share_cores(count)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # read when torch and tokenizers are first imported
        os.environ.setdefault(name, str(threads))
    store = _open_store(options)
    context = multiprocessing.get_context("spawn")
    children: list[BaseProcess] = []
    reports: list[Connection] = []
    resource_tracker.ensure_running()  # its start unblocks the signals that `deferred` holds back
    try:
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(
                target=_run_as_child, args=(options, kind, rank, threads, store.port, sender), name=f"process {rank}"
            )
            children.append(child)
            with deferred():
                child.start()
            sender.close()
            reports.append(receiver)
        with signals.held(lambda: _terminate(children)):
            if signals.received:  # between the two lines above
                _terminate(children)
            _wait_for(children, reports)
        if signals.received:  # too late for the processes to be stopped by it
            raise Stopped(signals.received, "when the run had ended")
    except Stopped as error:
        raise Stopped(signals.received or error.number, error.where) from None
    finally:
        _end(children)


def _open_store(options: Options) -> distributed.TCPStore:
    """Where the processes find each other: on --port, or on a free one.

    Raises:
        UserError: another program listens there, or the address is not this machine's.
    """
    try:
        with socket.socket() as probe:  # the store itself would share a port with a listener on one address of it
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that ended just now holds none
            probe.bind((options.addr, options.port or 0))
        return distributed.TCPStore(options.addr, options.port or 0, is_master=True, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        where = f"--addr {options.addr}" + (f" --port {options.port}" if options.port else "")
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: cannot be listened on ({reason}); give another one") from None


def _run_as_child(options: Options, kind: str, rank: int, threads: int, port: int, report: Connection) -> None:
    """What a spawned process does. It reports how it failed, and prints nothing itself."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    show_messages(enabled=rank == 0)
    prepare_process()
    signals = Signals()
    try:
        with signals.handled():
            _run_spawned(options, kind, rank, threads, port, signals)
            leave()  # here, where a signal still ends it with a report
    except UserError as error:
        _fail(report, Report("mistake", str(error), USER_ERROR_STATUS))
    except Stopped as error:
        _fail(report, Report("signal", error.where, error.status))
    except BaseException:
        _fail(report, Report("fault", traceback.format_exc(), 1))


def _run_spawned(options: Options, kind: str, rank: int, threads: int, port: int, signals: Signals) -> None:
    if options.deterministic:
        choose_deterministic()
    torch.set_num_threads(threads)
    if kind == "cpu" and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    process = Process(open_device(kind, options.device_list[rank]), rank, len(options.device_list))
    store = distributed.TCPStore(options.addr, port, is_master=False)
    distributed.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=process.world_size)
    train.run(options, process, signals)
    distributed.destroy_process_group()


def _fail(report: Connection, content: Report) -> NoReturn:
    """Reports and ends at once: peers wait for this process, so nothing here may wait for them."""
    report.send(content)
    leave(content.status)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _wait_for(children: Sequence[BaseProcess], reports: Sequence[Connection]) -> None:
    """Returns when all have ended well; raises the cause when one has not."""
    running = list(children)
    while running:
        wait([child.sentinel for child in running])
        # First this: a process may be found to have ended only at the second look after its sentinel told of it.
        running = [child for child in running if child.exitcode is None]
        if any(child.exitcode not in (None, 0) for child in children):
            _raise_cause(children, reports)


def _raise_cause(children: Sequence[BaseProcess], reports: Sequence[Connection]) -> None:
    """Raises what went wrong first.

    A process whose peer is gone fails too, with an error of the connection. So a user's mistake, a signal, or a
    process that something killed, is the cause before any traceback is.
    """
    time.sleep(_SECONDS_TO_FAIL_TOGETHER)
    said = [_read(report) for report in reports]
    for report in said:
        if report is not None and report.kind == "mistake":
            raise UserError(report.text)
    for report in said:
        if report is not None and report.kind == "signal":
            raise Stopped(report.status - 128, report.text)
    for child, report in zip(children, said, strict=True):
        if report is None and child.exitcode not in (None, 0):
            raise RunFailed(f"{child.name} {_ending(child.exitcode)}; all processes were ended")
    for child, report in zip(children, said, strict=True):
        if report is not None:
            raise RunFailed(f"{child.name} failed; all processes were ended\n{report.text}")


def _read(report: Connection) -> Report | None:
    try:
        return report.recv() if report.poll() else None
    except EOFError:  # it ended without a word
        return None


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with status {exitcode}"


def _terminate(children: Sequence[BaseProcess]) -> None:
    for child in children:
        if child.is_alive():
            child.terminate()


def _end(children: Sequence[BaseProcess]) -> None:
    _terminate(children)
    deadline = time.monotonic() + _SECONDS_TO_END
    for child in children:
        if child.pid is None:  # it was never started
            continue
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()
