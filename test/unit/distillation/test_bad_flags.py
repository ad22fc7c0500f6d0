"""A mistake in a flag gives one line with the flag's name and status 2, before any file is read."""

import pytest
from cases import Workplace

MISTAKES = {
    "unknown task": ({"task_name": "SST2"}, ["--task_name SST2", "SST-2, MNLI"]),
    "line break in a value": ({"task_name": "SST-2\nSST-2"}, ["--task_name"]),
    "unknown flag": ({"learning_rat": 1}, ["--learning_rat", "--help"]),
    "no output folder": ({"output_dir": None}, ["--output_dir"]),
    "no log folder": ({"fps_acc_dir": None}, ["--fps_acc_dir"]),
    "no data folder": ({"data_dir": None}, ["--data_dir"]),
    "no teacher": ({"teacher_model": None}, ["--teacher_model", "intermediate-layer distillation"]),
    "no student": ({"student_model": None}, ["--student_model", "intermediate-layer distillation"]),
    "no student to evaluate": (
        {"do_eval": True, "teacher_model": None, "student_model": None},
        ["--student_model", "evaluation"],
    ),
    "two stages": ({"do_eval": True, "pred_distill": True}, ["--do_eval", "--pred_distill"]),
    "predict_file without do_predict": ({"predict_file": "test.tsv"}, ["--predict_file", "--do_predict"]),
    "unknown device": ({"device": "tpu"}, ["--device", "'tpu'"]),
    "unknown level": ({"opt_level": "O4"}, ["--opt_level", "'O4'"]),
    "unknown padding": ({"padding": "no"}, ["--padding", "'no'"]),
    "device list of words": ({"device_list": "a"}, ["--device_list a"]),
    "empty device list": ({"device_list": ""}, ["--device_list"]),
    "the same device twice": ({"device_list": "0,0"}, ["--device_list 0,0"]),
    "device below 0": ({"device_list": "-1"}, ["--device_list"]),
    "too few examples for the micro-batches": (
        {"gradient_accumulation_steps": 33},
        ["--train_batch_size 32", "--gradient_accumulation_steps 33"],
    ),
}

OUT_OF_RANGE = {
    "max_seq_length": [7, "x"],
    "train_batch_size": [0, 1.5],
    "eval_batch_size": [0],
    "learning_rate": [0, "nan", "inf", -0.5],
    "weight_decay": [-0.1, "nan", "inf"],
    "num_train_epochs": [0, "inf", 1e8],
    "warmup_proportion": [-0.1, 1, "nan"],
    "seed": [-1, 2**32],
    "gradient_accumulation_steps": [0],
    "temperature": [0, -2],
    "eval_step": [0],
    "output_txt_step": [0],
    "save_steps": [0],
    "workers": [-1],
    "loss_scale": [0, -2, "inf", "static"],
    "port": [0, 65536],
    "cache_limit": [-1, "nan"],
}


@pytest.fixture
def nowhere(tmp_path) -> Workplace:
    """Folders that do not exist."""
    return Workplace(tmp_path, "SST-2", 16)


@pytest.mark.parametrize(("flags", "facts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_flags_is_one_line(nowhere, flags, facts):
    line = nowhere.fails(**flags)
    assert all(fact in line for fact in facts), line


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values],
    ids=str,
)
def test_a_value_out_of_its_range_is_one_line(nowhere, flag, value):
    line = nowhere.fails(**{flag: value})
    assert f"--{flag}" in line
    assert "expected" in line or "invalid" in line
