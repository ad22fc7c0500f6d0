"""The tables of benchmarks/throughput.py: each is a list of runs of main.py with different flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from transformer.errors import UserError

STAGES = ("intermediate", "prediction")
REFERENCE = ("--padding", "max_length")
LONGEST = ("--padding", "longest", "--no-group_by_length")
GROUPED = ("--padding", "longest")
FAST = (*GROUPED, "--amp")
# The flags with which the teacher's outputs are cached in a run of several epochs, and with which they are not.
CACHED = {"intermediate": ("--cache_teacher_states",), "prediction": ()}
LIVE = {"intermediate": (), "prediction": ("--no_teacher_cache",)}


@dataclass(frozen=True)
class Row:
    """A line of the table: a run of main.py.

    is_reference: whether --reference_revision's main.py runs it. slow: whether it has few steps.
    epochs: passes over the rows; a second one is free of warm-up. cached: whether the teacher's outputs are.
    length: of all texts, in tokens; 0 is their own. processes: of one thread each; 0 is those of --device_list.
    examples: per step, of all processes.
    """

    title: str
    stage: str
    flags: tuple[str, ...]
    is_reference: bool = False
    slow: bool = False
    epochs: int = 2
    cached: bool = False
    length: int = 0
    processes: int = 0
    examples: int = 32


def rows_of_switches() -> list[Row]:
    """Return the usual table, each stage's reference first."""
    table = []
    for stage in STAGES:
        reference = Row("reference", stage, REFERENCE, slow=True, epochs=1)
        # With --padding max_length the padding is trained too, so there are no states to cache.
        cached = (*LONGEST, *CACHED[stage]) if stage == "intermediate" else REFERENCE
        table += [
            replace(reference, is_reference=True),
            replace(reference, title="reference settings, this revision"),
            replace(reference, title="alone: padded to the longest", flags=LONGEST),
            replace(reference, title="alone: similar lengths", flags=(*REFERENCE, "--group_by_length")),
            replace(reference, title="alone: amp", flags=(*REFERENCE, "--amp")),
            replace(reference, title="alone: teacher cached", flags=cached, epochs=2, cached=True),
            Row("together: longest, similar lengths", stage, (*GROUPED, *LIVE[stage])),
            Row("together: and amp", stage, (*FAST, *LIVE[stage])),
            Row("together: and teacher cached", stage, (*FAST, *CACHED[stage]), cached=True),
        ]
    return table


def choose_rows(flags: argparse.Namespace) -> list[Row]:
    """Return the rows that the flags of benchmarks/throughput.py name, with each stage's first.

    Raises:
        UserError: there are none.
    """
    table = rows_of_switches()
    fast = [Row("", stage, (*FAST, *LIVE[stage])) for stage in STAGES]
    if flags.lengths is not None:
        table = [replace(row, title=f"{count} tokens", length=count) for row in fast for count in flags.lengths]
    elif flags.processes is not None:
        table = [
            replace(row, title=f"{count} x 1 thread", processes=count, examples=32 * count)
            for row in fast
            for count in flags.processes
        ]
    elif flags.batches is not None:
        table = [replace(row, title=f"batches of {count}", examples=count) for row in fast for count in flags.batches]
    table = [row for row in table if flags.stage in (None, row.stage)]
    bases = {row.stage: row for row in reversed(table)}.values()
    chosen = [row for row in table if flags.only in row.title]
    if not chosen:
        raise UserError(f"--only {flags.only}: no row's title contains this text")
    return [row for row in table if row in chosen or row in bases]
