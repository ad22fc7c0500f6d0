"""TinyBERT on SST-2 and MNLI: intermediate-layer distillation, prediction-layer distillation, evaluation.

    python main.py --data_dir glue_dir/SST-2 --task_name SST-2 --do_lower_case \
        --teacher_model bert_base_uncased_ft_sst --student_model general_tinybert \
        --output_dir tmp_tinybert_dir --fps_acc_dir ./output

The scripts in test/ call it with the settings of each kind of run; `python main.py --help` lists all flags.
"""

import sys

if __name__ == "__main__":  # before the imports below, which take seconds
    from distillation.runtime.signals import end_quietly

    end_quietly("main.py")

from collections.abc import Sequence

from distillation.flags import Entry
from distillation.launch import launch, run_entry
from distillation.options import parse_options

ENTRY = Entry(
    prog="main.py",
    description=(__doc__ or "TinyBERT").splitlines()[0],
    tasks=("SST-2", "MNLI"),
    tasks_with_defaults=("SST-2",),
    fps_acc_dir=None,
    max_seq_length=64,
    eval_step=100,
)


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and start the run."""
    launch(parse_options(arguments, ENTRY))


if __name__ == "__main__":
    sys.exit(run_entry(ENTRY.prog, main))
