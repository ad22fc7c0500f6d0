"""The tables that benchmarks/throughput.py can take: each a list of runs of main.py with other flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import ASK, REFERENCE, ROOT, STAGES

GROUPED = ("--padding", "longest")
LONGEST = (*GROUPED, "--no-group_by_length")
FAST = (*GROUPED, "--amp")
KEEP = ("--cache_teacher_states",)
BATCH = 32


@dataclass(frozen=True)
class Row:
    """A line of the table: a run of main.py.

    tree: whose main.py. slow: whether it has few steps. epochs: passes over the rows; with more than one the
    teacher may be remembered, and what a kernel costs at a batch's first shape is over. length: of all texts, in
    tokens; 0 is their own. processes: of one thread each; 0 is what --device_list says, with all their threads.
    apart: whether these processes are runs of their own at the same time, which exchange nothing. examples: a step of
    each process.
    """

    title: str
    stage: str
    flags: tuple[str, ...]
    tree: Path = ROOT
    slow: bool = False
    epochs: int = 1
    length: int = 0
    processes: int = 0
    apart: bool = False
    examples: int = BATCH

    @property
    def remembers(self) -> bool:
        """Whether the teacher is asked beforehand."""
        return self.epochs > 1 and (KEEP[0] in self.flags or (self.stage == "prediction" and ASK[0] not in self.flags))

    @property
    def batch(self) -> int:
        """Examples a step of all processes of a run."""
        return self.examples * (1 if self.apart else max(1, self.processes))


def rows(reference: Path, keeps_states: bool) -> list[Row]:
    """The runs of the usual table, each stage's reference first.

    Args:
        reference: the tree whose main.py is the reference.
        keeps_states: whether main.py has --cache_teacher_states.
    """
    table = []
    for stage in STAGES:
        prediction = stage == "prediction"
        ask = ASK if prediction else ()
        # An older revision need not know the flag, and asks in every step anyway.
        table += [
            Row("reference", stage, (*REFERENCE, *(ask if reference == ROOT else ())), reference, slow=True),
            Row("reference settings, today's code", stage, (*REFERENCE, *ask), slow=True),
            Row("alone: padded to the longest", stage, (*LONGEST, *ask), slow=True),
            Row("alone: like lengths", stage, (*REFERENCE, "--group_by_length", *ask), slow=True),
            Row("alone: amp", stage, (*REFERENCE, "--amp", *ask), slow=True),
        ]
        if prediction:
            table += [Row("alone: teacher remembered", stage, REFERENCE, slow=True, epochs=2)]
        elif keeps_states:  # which has no meaning where padding is learned too
            table += [Row("alone: states kept (and longest)", stage, (*LONGEST, *KEEP), slow=True, epochs=2)]
        table += [
            Row("together: longest, like lengths", stage, (*GROUPED, *ask), epochs=2),
            Row("together: and amp", stage, (*FAST, *ask), epochs=2),
        ]
        if prediction:
            table += [Row("together: and teacher remembered", stage, FAST, epochs=2)]
        elif keeps_states:
            table += [Row("together: and states kept", stage, (*FAST, *KEEP), epochs=2)]
    return table


def rows_of_lengths(lengths: Sequence[int]) -> list[Row]:
    """Both stages in the settings for speed, the teacher being asked, on texts of these many tokens."""
    return [
        Row(f"{length} tokens", stage, (*FAST, *(ASK if stage == "prediction" else ())), epochs=2, length=length)
        for stage in STAGES
        for length in lengths
    ]


def rows_of_processes(counts: Sequence[int]) -> list[Row]:
    """Likewise in so many processes of one thread, 32 examples a step for each.

    As many runs apart, at the same time, show what the machine itself has for so many.
    """
    table = []
    for stage in STAGES:
        flags = (*FAST, *(ASK if stage == "prediction" else ()))
        for count in counts:
            one = Row(f"{count} x 1 thread", stage, flags, epochs=2, processes=count)
            table.append(one)
            if count > 1:
                table.append(replace(one, title=f"{count} x 1 thread, runs apart", apart=True))
    return table


def rows_of_batches(sizes: Sequence[int]) -> list[Row]:
    """The settings for speed with so many examples a step; in the prediction stage the teacher is remembered."""
    return [Row(f"batches of {size}", stage, FAST, epochs=2, examples=size) for stage in STAGES for size in sizes]
