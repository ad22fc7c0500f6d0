"""The bash scripts in test/, as a user types them: their settings, and a whole 1p chain on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import ROOT, Run, Workplace, report_lack

import main
from distillation.options import Options, Stage, parse_options

TEST = ROOT / "test"
SCRIPTS = sorted(path.name for path in TEST.glob("*.sh"))
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")  # none of them is a setting
INHERITED += ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # other_machines.sh sets these


def inherited() -> dict[str, str]:
    return {key: os.environ[key] for key in INHERITED if key in os.environ}


def script(name: str, *flags: str, cwd: Path = ROOT, **variables: object) -> Run:
    """Runs test/NAME with these flags and these settings alone."""
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **inherited()}
    environment |= {key: str(value) for key, value in variables.items()}
    path = os.path.relpath(TEST / name, cwd)
    done = subprocess.run(
        ["bash", path, *flags], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


def asked_for(name: str, folder: Path, *flags: str, **variables: object) -> list[Options]:
    """The options of each main.py command that a script gives, nothing of it being run."""
    recorder, record = folder / "python", folder / "commands"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> "{record}"\nprintf "\\n" >> "{record}"\n')
    recorder.chmod(0o755)
    record.unlink(missing_ok=True)
    done = script(name, *flags, PYTHON=recorder, **variables)
    assert (done.status, done.out, done.err) == (0, "", "")
    commands = [line.rstrip("\0").split("\0") for line in record.read_text().splitlines()]
    assert all(command[0] == "main.py" for command in commands)
    return [parse_options(command[1:], main.ENTRY) for command in commands]


SST = {
    "data_dir": Path("glue_dir/SST-2"),
    "teacher_model": Path("bert_base_uncased_ft_sst"),
    "fps_acc_dir": Path("output"),
    "train_batch_size": 32,
    "max_seq_length": 64,
    "do_lower_case": True,
    "aug_train": True,
    "amp": True,
    "device": "auto",
    "overwrite_output_dir": False,
}
FIRST = SST | {"stage": Stage.INTERMEDIATE, "student_model": Path("general_tinybert"), "opt_level": "O1"}
SECOND = SST | {
    "stage": Stage.PREDICTION,
    "opt_level": "O2",
    "loss_scale": 128,
    "learning_rate": 3e-5,
    "eval_step": 100,
}
TABLE = {
    "train_performance_{}_1": FIRST
    | {"num_train_epochs": 1, "performance": True, "output_dir": Path("tmp_tinybert_performance")},
    "train_performance_{}_2": SECOND
    | {
        "num_train_epochs": 1,
        "performance": True,
        "student_model": Path("tmp_tinybert_performance"),
        "output_dir": Path("TinyBERT_dir_performance"),
    },
    "train_full_{}_1": FIRST | {"num_train_epochs": 10, "performance": False, "output_dir": Path("tmp_tinybert_dir")},
    "train_full_{}_2": SECOND
    | {
        "num_train_epochs": 3,
        "performance": False,
        "student_model": Path("tmp_tinybert_dir"),
        "output_dir": Path("TinyBERT_dir"),
    },
    "train_eval_{}": {
        "stage": Stage.EVALUATION,
        "data_dir": Path("glue_dir/SST-2"),
        "student_model": Path("TinyBERT_dir"),
        "output_dir": Path("result_dir"),
        "eval_batch_size": 32,
        "max_seq_length": 64,
        "amp": False,
        "do_lower_case": True,
    },
}


def differences(options: Options, expected: dict) -> dict:
    return {name: getattr(options, name) for name, value in expected.items() if getattr(options, name) != value}


@pytest.mark.parametrize("mode", ["1p", "8p"])
@pytest.mark.parametrize("name", TABLE)
def test_scripts_have_the_originals_settings(name, mode, tmp_path):
    (options,) = asked_for(f"{name.format(mode)}.sh", tmp_path)
    assert differences(options, TABLE[name]) == {}
    assert options.task.name == "SST-2"
    assert options.log_name(len(options.device_list)) == name.format(mode)
    assert options.device_list == (tuple(range(8)) if mode == "8p" else (0,))
    assert options.port == (12000 if mode == "8p" else None)


def test_finetune_goes_through_both_stages_on_mnli(tmp_path):
    first, second = asked_for("train_finetune_1p.sh", tmp_path)
    shared = SST | {
        "data_dir": Path("glue_dir/MNLI"),
        "teacher_model": Path("bert_base_uncased_ft_mnli"),
        "aug_train": False,
        "transfer_learning": True,
        "opt_level": "O1",
    }
    between = Path("tmp_tinybert_finetune")
    assert differences(first, shared | {"student_model": Path("general_tinybert"), "output_dir": between}) == {}
    assert differences(second, shared | {"student_model": between, "output_dir": Path("TinyBERT_dir_finetune")}) == {}
    assert (first.task.name, second.task.name) == ("MNLI", "MNLI")
    assert (first.num_train_epochs, second.num_train_epochs) == (10, 3)
    assert (first.log_name(1), second.log_name(1)) == ("train_finetune_1p_1", "train_finetune_1p_2")


@pytest.mark.parametrize(("task", "folder"), [("SST-2", "sst"), ("MNLI", "mnli"), ("mnli", "mnli")])
def test_the_teachers_folder_is_the_one_that_the_students_scripts_read(task, folder, tmp_path):
    (options,) = asked_for("train_teacher_1p.sh", tmp_path, TASK_NAME=task)
    assert options.stage is Stage.FINETUNE
    assert options.teacher_model == Path("bert_base_uncased")
    assert options.output_dir == Path(f"bert_base_uncased_ft_{folder}")
    assert options.data_dir.name == options.task.name
    assert (options.num_train_epochs, options.learning_rate, options.train_batch_size) == (3, 2e-5, 32)
    assert not options.aug_train


@pytest.mark.parametrize("name", ["train_full_1p_1.sh", "train_performance_8p_2.sh"])
def test_settings_are_variables_and_flags_that_follow_win(name, tmp_path):
    (options,) = asked_for(
        name,
        tmp_path,
        *("--num_train_epochs", "0.5", "--padding", "max_length"),
        DATA_DIR="my data",
        TEACHER_MODEL="t",
        STUDENT_MODEL="s",
        OUTPUT_DIR="o",
        FPS_ACC_DIR="f",
        DEVICE="cpu",
        DEVICE_LIST="0,1",
        EPOCHS=7,
        BATCH_SIZE=8,
        MAX_SEQ_LENGTH=16,
        LEARNING_RATE=1e-3,
        OPT_LEVEL="O0",
        LOSS_SCALE="dynamic",
        AUG_TRAIN=0,
        DO_LOWER_CASE=0,
        OVERWRITE_OUTPUT_DIR=1,
        SEED=7,
    )
    expected = {
        "data_dir": Path("my data"),
        "teacher_model": Path("t"),
        "student_model": Path("s"),
        "output_dir": Path("o"),
        "fps_acc_dir": Path("f"),
        "device": "cpu",
        "device_list": (0, 1),
        "num_train_epochs": 0.5,
        "padding": "max_length",
        "train_batch_size": 8,
        "max_seq_length": 16,
        "learning_rate": 1e-3,
        "opt_level": "O0",
        "loss_scale": None,
        "aug_train": False,
        "do_lower_case": None,
        "overwrite_output_dir": True,
        "seed": 7,
    }
    assert differences(options, expected) == {}


def tiny(place: Workplace, **folders: object) -> dict[str, object]:
    """The variables that lead a script to a workplace."""
    return {
        "DATA_DIR": place.data,
        "TEACHER_MODEL": place.teacher,
        "STUDENT_MODEL": place.student,
        "FPS_ACC_DIR": place.output,
        "MAX_SEQ_LENGTH": place.max_seq_length,
        "BATCH_SIZE": 3,
        "DEVICE": "cpu",
        "AUG_TRAIN": 0,
        **folders,
    }


QUICK = ("--num_train_epochs", "1", "--output_txt_step", "1")


class Chain:
    """The 1p scripts, one after the other, on a tiny case."""

    def __init__(self, folder: Path) -> None:
        self.place = cases.Golden("sst2_small").workplace(folder)
        self.teacher, self.between, self.student, self.result = (
            folder / name for name in ("new teacher", "tmp_tinybert_dir", "TinyBERT_dir", "result_dir")
        )
        self.runs = [
            self.run("train_teacher_1p.sh", *QUICK, OUTPUT_DIR=self.teacher),
            self.first_stage(),
            self.run(
                "train_full_1p_2.sh",
                *QUICK,
                TEACHER_MODEL=self.teacher,
                STUDENT_MODEL=self.between,
                OUTPUT_DIR=self.student,
            ),
            self.run("train_eval_1p.sh", STUDENT_MODEL=self.student, OUTPUT_DIR=self.result),
            script("demo.sh", "--text", "a film", "--text", "", STUDENT_MODEL=self.student),
        ]

    def run(self, name: str, *flags: str, **variables: object) -> Run:
        return script(name, *flags, **tiny(self.place, **variables))

    def first_stage(self, **variables: object) -> Run:
        return self.run("train_full_1p_1.sh", *QUICK, TEACHER_MODEL=self.teacher, OUTPUT_DIR=self.between, **variables)

    def logs(self) -> dict[str, list[str]]:
        return {path.name: path.read_text().splitlines() for path in self.place.output.glob("*.txt")}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_the_1p_chain_goes_from_teacher_to_demo(chain):
    assert [(run.status, run.err) for run in chain.runs] == [(0, "")] * 5
    assert "acc = " in (chain.result / "eval_results.txt").read_text()
    assert chain.runs[-1].out.splitlines()[-1] == "the logits were the same, bit for bit, in all 20 repetitions"


def test_each_script_of_the_chain_has_its_log(chain):
    logs = chain.logs()
    assert {"train_teacher_1p.txt", "train_full_1p_1.txt", "train_full_1p_2.txt", "train_eval_1p.txt"} == set(logs)
    assert len(logs["train_full_1p_2.txt"]) == 3  # eight examples in batches of three
    assert "acc" in logs["train_full_1p_2.txt"][-1]


def test_a_rerun_is_refused_unless_the_variable_allows_it_and_its_log_is_appended(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.place.folder.rglob("*")}
    lines = chain.logs()["train_full_1p_1.txt"]
    refused = chain.first_stage()
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "OVERWRITE_OUTPUT_DIR=1" in refused.err
    assert {path: path.stat().st_mtime_ns for path in chain.place.folder.rglob("*")} == before

    again = chain.first_stage(OVERWRITE_OUTPUT_DIR=1)
    assert (again.status, again.err) == (0, "")
    assert chain.logs()["train_full_1p_1.txt"][: len(lines)] == lines
    assert len(chain.logs()["train_full_1p_1.txt"]) == 2 * len(lines)


def test_transfer_learning_from_a_student_of_another_task(mnli, tmp_path):
    cases.edit_weights(mnli.student, two_labels)
    student = tmp_path / "TinyBERT_dir_finetune"
    done = script(
        "train_finetune_1p.sh",
        *QUICK,
        **tiny(mnli, INTERMEDIATE_DIR=tmp_path / "between", OUTPUT_DIR=student),
    )
    assert (done.status, done.err) == (0, "")
    assert cases.read_bin(student)["classifier.weight"].shape[0] == 3
    assert {path.name for path in mnli.output.glob("*.txt")} == {"train_finetune_1p_1.txt", "train_finetune_1p_2.txt"}


def two_labels(weights: dict[str, torch.Tensor]) -> None:
    hidden = weights["bert.pooler.dense.bias"].shape[0]
    weights |= {"classifier.weight": torch.zeros(2, hidden), "classifier.bias": torch.zeros(2)}


def test_what_is_missing_is_told_in_one_line_and_nothing_is_written(sst2):
    before = sorted(sst2.folder.rglob("*"))
    done = script("train_full_1p_1.sh", **tiny(sst2, OUTPUT_DIR=sst2.model, AUG_TRAIN=1))
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert "train_aug.tsv" in done.err
    assert "AUG_TRAIN=0" in done.err
    assert sorted(sst2.folder.rglob("*")) == before


def test_scripts_go_to_the_repositorys_root(tmp_path):
    teller = tmp_path / "python"
    teller.write_text("#!/bin/sh\npwd\n")
    teller.chmod(0o755)
    assert script("train_eval_1p.sh", cwd=tmp_path, PYTHON=teller) == Run(0, f"{ROOT}\n", "")


def sourced(name: str, **variables: object) -> Run:
    """Sources an environment script as the others do, then prints what it is about."""
    names = "TOOLKIT ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL TASK_QUEUE_ENABLE HCCL_WHITELIST_DISABLE"
    program = f'set -euo pipefail; source test/{name}; for v in {names}; do echo "$v=${{!v-}}"; done; echo "$-"'
    environment = inherited() | {"HOME": "/nonexistent"} | {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("name", ["env_npu_1p.sh", "env_npu_8p.sh"])
def test_the_npu_environment_is_silent_without_a_toolkit(name):
    done = sourced(name)
    assert done.status == 0
    if Path("/usr/local/Ascend").exists():
        report_lack("an environment without an Ascend toolkit")
        return
    assert done.err == ""
    assert all(line.endswith("=") for line in done.out.splitlines()[:-1])


@pytest.mark.parametrize(("name", "whitelist"), [("env_npu_1p.sh", ""), ("env_npu_8p.sh", "1")])
def test_the_npu_environment_is_set_where_the_toolkit_is(name, whitelist, tmp_path):
    # A toolkit's script may read unset variables and end with a failing test.
    (tmp_path / "set_env.sh").write_text('export TOOLKIT="found${UNSET_VARIABLE}"\n[ -d /nonexistent ]\n')
    done = sourced(name, ASCEND_TOOLKIT_HOME=tmp_path, ASCEND_GLOBAL_LOG_LEVEL=1)
    *values, shell_options = done.out.splitlines()
    assert [value.partition("=")[2] for value in values] == ["found", "0", "1", "1", whitelist]
    assert {"e", "u"} <= set(shell_options)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stop_at_the_first_error(name):
    content = (TEST / name).read_text(encoding="utf-8")
    sourced_only = name.startswith(("env_npu", "common"))
    assert content.startswith("#!/usr/bin/env bash\n# ")
    assert sourced_only or "\nset -euo pipefail\n" in content
