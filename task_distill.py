"""TinyBERT on any GLUE task, or on your own: distillation, fine-tuning, evaluation, predictions.

    python task_distill.py --data_dir glue_dir/CoLA --task_name cola --do_lower_case \
        --teacher_model bert_base_uncased_ft_cola --student_model general_tinybert --output_dir tmp_cola
    python task_distill.py --task_file reviews.json ...

It takes all flags of main.py; `python task_distill.py --help` lists them. test/pipeline.sh runs all stages of a task.
"""

import sys

if __name__ == "__main__":  # before the imports below, which take seconds
    from distillation.runtime.signals import end_quietly

    end_quietly("task_distill.py")

from collections.abc import Sequence
from pathlib import Path

from distillation.flags import Entry
from distillation.launch import launch, run_entry
from distillation.options import parse_options

ENTRY = Entry(
    prog="task_distill.py",
    description=(__doc__ or "TinyBERT").splitlines()[0],
    tasks=None,
    tasks_with_defaults=None,
    fps_acc_dir=Path("output"),
    max_seq_length=128,
    eval_step=50,
)


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and start the run."""
    launch(parse_options(arguments, ENTRY))


if __name__ == "__main__":
    sys.exit(run_entry(ENTRY.prog, main))
