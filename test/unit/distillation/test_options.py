"""Flags become options: names, defaults of the original, and defaults that depend on the task."""

import dataclasses
from pathlib import Path

import pytest

import main
import task_distill
from data_processing.cache import Cache, default_folder
from distillation.flags import build_parser
from distillation.options import Options, Stage, parse_options


def options_of(*flags: str, task: str = "MNLI") -> Options:
    folders = ["--data_dir", "d", "--teacher_model", "t", "--student_model", "s", "--output_dir", "o"]
    return parse_options([*folders, "--fps_acc_dir", "f", "--task_name", task, *flags], main.ENTRY)


@pytest.mark.parametrize(
    ("task", "flags", "epochs", "length"),
    [
        ("SST-2", [], 10, 64),
        ("sst-2", ["--pred_distill"], 3, 64),
        ("SST-2", ["--num_train_epochs", "2", "--max_seq_length", "32"], 2, 32),
        ("mnli", [], 3, 64),
    ],
)
def test_epochs_and_length_default_to_the_tasks(task, flags, epochs, length):
    """Trap 12. main.py has only those of SST-2."""
    options = options_of(*flags, task=task)
    assert (options.num_train_epochs, options.max_seq_length) == (epochs, length)


def test_flags_have_the_originals_names_and_defaults():
    options = options_of()
    expected = {
        "data_url": "",
        "max_seq_length": 64,
        "do_lower_case": None,
        "train_batch_size": 32,
        "eval_batch_size": 32,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "num_train_epochs": 3.0,
        "warmup_proportion": 0.1,
        "seed": 42,
        "gradient_accumulation_steps": 1,
        "temperature": 1.0,
        "amp": False,
        "opt_level": "O1",
        "loss_scale": 128.0,
        "aug_train": False,
        "eval_step": 100,
        "workers": 4,
        "device": "auto",
        "device_list": (0,),
        "addr": "127.0.0.1",
        "port": None,
        "performance": False,
        "output_txt_step": 100,
        "transfer_learning": False,
        "padding": "longest",
        "overwrite_output_dir": False,
    }
    assert expected.items() <= dataclasses.asdict(options).items()
    assert options.stage is Stage.INTERMEDIATE
    assert options.cache == Cache(default_folder(), 20_000_000_000)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--wd", "0.3"], "weight_decay", 0.3),
        (["-j", "2"], "workers", 2),
        (["--loss_scale", "dynamic"], "loss_scale", None),
        (["--loss_scale", "-1"], "loss_scale", None),
        (["--loss_scale", "-1.0"], "loss_scale", None),
        (["--cache_dir", "c"], "cache", Cache(Path("c"), 20_000_000_000)),
        (["--cache_dir", "c", "--cache_limit", "0"], "cache", Cache(None, 0)),
        ([], "group_by_length", True),
        (["--padding", "max_length"], "group_by_length", False),
        (["--no-group_by_length"], "group_by_length", False),
        (["--padding", "max_length", "--group_by_length"], "group_by_length", True),
    ],
    ids=str,
)
def test_a_flag_sets_its_option(flags, name, value):
    assert getattr(options_of(*flags), name) == value


@pytest.mark.parametrize("entry", [main.ENTRY, task_distill.ENTRY], ids=["main", "task_distill"])
def test_help_explains_every_flag_and_shows_real_defaults(entry):
    parser = build_parser(entry)
    assert not [action.dest for action in parser._actions if not action.help]
    words = parser.format_help()
    assert "default: None" not in words
    assert "default: False" not in words
    assert "(default: 5e-05)" in words
