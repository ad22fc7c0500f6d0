"""Mistakes in flags: each is one line, told before anything is read."""

import pytest
from cases import Workplace

EVAL = {"do_eval": True, "teacher_model": None}


FLAGS = {
    "unknown task": ({"task_name": "SST2"}, "--task_name SST2: no such task; the tasks are SST-2, MNLI"),
    "unknown flag": ({"learning_rat": 1}, "unrecognized arguments: --learning_rat 1 (see --help)"),
    "no output folder": ({"output_dir": None}, "the following arguments are required: --output_dir"),
    "no log folder": ({"fps_acc_dir": None}, "the following arguments are required: --fps_acc_dir"),
    "no data folder named": ({"data_dir": None}, "the following arguments are required: --data_dir"),
    "no teacher named": (
        {"teacher_model": None},
        "--teacher_model is required for intermediate-layer distillation",
    ),
    "no student named": (
        {"student_model": None},
        "--student_model is required for intermediate-layer distillation",
    ),
    "no student to evaluate": ({**EVAL, "student_model": None}, "--student_model is required for evaluation"),
    "two stages": (
        {"do_eval": True, "pred_distill": True},
        "give only one of --do_eval and --pred_distill",
    ),
    "unknown device": ({"device": "tpu"}, "--device: invalid choice: 'tpu'"),
    "unknown level": ({"opt_level": "O4"}, "--opt_level: invalid choice: 'O4'"),
    "unknown padding": ({"padding": "no"}, "--padding: invalid choice: 'no'"),
    "device list of words": ({"device_list": "a"}, "--device_list a: expected device ids split by commas"),
    "empty device list": ({"device_list": ""}, "--device_list : expected device ids split by commas"),
    "a device twice": ({"device_list": "0,0"}, "--device_list 0,0: expected different ids from 0 on"),
    "a device below 0": ({"device_list": "-1"}, "--device_list"),
}


RANGES = [
    ("max_seq_length", 7, "expected 8 or more"),
    ("max_seq_length", "x", "invalid int value: 'x'"),
    ("train_batch_size", 0, "expected 1 or more"),
    ("train_batch_size", 1.5, "invalid int value: '1.5'"),
    ("eval_batch_size", 0, "expected 1 or more"),
    ("learning_rate", 0, "expected a number above 0"),
    ("learning_rate", "nan", "expected a number above 0"),
    ("learning_rate", "inf", "expected a number above 0"),
    ("learning_rate", -0.5, "expected a number above 0"),
    ("weight_decay", -0.1, "expected 0 or more"),
    ("weight_decay", "nan", "expected 0 or more"),
    ("weight_decay", "inf", "expected a number"),
    ("num_train_epochs", 0, "expected a number above 0"),
    ("num_train_epochs", "inf", "expected a number above 0"),
    ("warmup_proportion", -0.1, "expected 0 or more"),
    ("warmup_proportion", 1, "expected a share below 1"),
    ("warmup_proportion", "nan", "expected 0 or more"),
    ("seed", -1, "expected 0 or more"),
    ("seed", 2**32, "expected a number below 2**32"),
    ("gradient_accumulation_steps", 0, "expected 1 or more"),
    ("gradient_accumulation_steps", 33, "is less than --gradient_accumulation_steps 33"),
    ("temperature", 0, "expected a number above 0"),
    ("temperature", -2, "expected a number above 0"),
    ("eval_step", 0, "expected 1 or more"),
    ("output_txt_step", 0, "expected 1 or more"),
    ("workers", -1, "expected 0 or more"),
    ("loss_scale", 0, "expected a number above 0, dynamic, or -1 for dynamic"),
    ("loss_scale", -2, "expected a number above 0, dynamic, or -1 for dynamic"),
    ("loss_scale", "inf", "expected a number above 0, dynamic, or -1 for dynamic"),
    ("loss_scale", "static", "expected a number above 0, dynamic, or -1 for dynamic"),
    ("port", 0, "expected 1 to 65535"),
    ("port", 65536, "expected 1 to 65535"),
]


@pytest.fixture
def nowhere(tmp_path) -> Workplace:
    """Folders of which none is there: a mistake in the flags is told before anything is read."""
    return Workplace(tmp_path, "SST-2", 16)


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_a_mistake_in_the_flags_is_one_line(nowhere, flags, message):
    assert message in nowhere.fails(**flags)


@pytest.mark.parametrize(("flag", "value", "message"), RANGES, ids=[f"{flag} {value}" for flag, value, _ in RANGES])
def test_a_value_out_of_its_range_is_one_line(nowhere, flag, value, message):
    line = nowhere.fails(**{flag: value})
    assert f"--{flag}" in line
    assert message in line


def test_a_name_with_a_line_break_makes_no_second_line(nowhere):
    assert "--task_name" in nowhere.fails(task_name="SST-2\nSST-2")
