"""Flags become options: names, defaults, and what follows from the task."""

import dataclasses
from pathlib import Path

import pytest

import main
from data_processing.cache import Cache, default_folder
from distillation.flags import build_parser
from distillation.options import Options, Stage, parse_options


@pytest.mark.parametrize(
    ("task", "flags", "epochs", "length"),
    [
        ("SST-2", [], 10, 64),
        ("sst-2", ["--pred_distill"], 3, 64),
        ("SST-2", ["--num_train_epochs", "2", "--max_seq_length", "32"], 2, 32),
        ("MNLI", [], 3, 64),
        ("mnli", ["--pred_distill"], 3, 64),
    ],
)
def test_task_defaults_act_where_no_flag_is_given(task, flags, epochs, length):
    """Trap 12. main.py has only SST-2's."""
    options = options_of("--task_name", task, *flags)
    assert (options.num_train_epochs, options.max_seq_length) == (epochs, length)


def options_of(*flags: str) -> Options:
    folders = ["--data_dir", "d", "--teacher_model", "t", "--student_model", "s", "--output_dir", "o"]
    return parse_options([*folders, "--fps_acc_dir", "f", *flags], main.ENTRY)


def test_flags_have_the_originals_names_and_defaults():
    options = options_of("--task_name", "MNLI")
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
    assert options_of("--task_name", "MNLI", "--cache_dir", "c").cache.folder == Path("c")
    assert options_of("--task_name", "MNLI", "--cache_dir", "c", "--cache_limit", "0").cache.folder is None
    assert options_of("--task_name", "MNLI", "--wd", "0.3", "-j", "2").weight_decay == 0.3
    assert options_of("--task_name", "MNLI", "-j", "2").workers == 2
    for dynamic in ("dynamic", "-1", "-1.0"):
        assert options_of("--task_name", "MNLI", "--loss_scale", dynamic).loss_scale is None


def test_every_flag_is_explained():
    unexplained = [action.dest for action in build_parser(main.ENTRY)._actions if not action.help]
    assert unexplained == []


def test_help_promises_no_default_that_is_none():
    words = build_parser(main.ENTRY).format_help()
    assert "default: None" not in words
    assert "(default: 5e-05)" in words


@pytest.mark.parametrize(
    ("flags", "grouped"),
    [
        ([], True),
        (["--padding", "max_length"], False),
        (["--no-group_by_length"], False),
        (["--padding", "max_length", "--group_by_length"], True),
    ],
)
def test_texts_of_like_length_go_together_unless_the_originals_arithmetic_is_asked_for(flags, grouped):
    assert options_of("--task_name", "SST-2", *flags).group_by_length is grouped
