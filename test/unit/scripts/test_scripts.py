"""The bash scripts in test/ as a user types them: their settings, and all 1p scripts on tiny models."""

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


def bash(*arguments: str, cwd: Path = ROOT, **variables: object) -> Run:
    """Run bash with these variables, and without other settings in this process's environment."""
    inherited = {key: os.environ[key] for key in INHERITED if key in os.environ}
    environment = inherited | {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


def script(name: str, *flags: str, cwd: Path = ROOT, **variables: object) -> Run:
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": 1, **variables}
    return bash(os.path.relpath(TEST / name, cwd), *flags, cwd=cwd, **settings)


def stand_in_python(folder: Path, program: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    return path


def options_of(name: str, folder: Path, *flags: str, **variables: object) -> list[Options]:
    """Return the options of each main.py command of a script, without running main.py."""
    record = folder / "commands"
    python = stand_in_python(folder, f'printf "%s\\0" "$@" >> "{record}"; printf "\\n" >> "{record}"')
    assert script(name, *flags, PYTHON=python, **variables) == Run(0, "", "")
    commands = [line.rstrip("\0").split("\0") for line in record.read_text().splitlines()]
    assert all(command[0] == "main.py" for command in commands)
    return [parse_options(command[1:], main.ENTRY) for command in commands]


def assert_options(options: Options, **expected: object) -> None:
    found = {name: getattr(options, name) for name in expected}
    assert {name: str(value) if isinstance(value, Path) else value for name, value in found.items()} == expected


SST = {
    **{"data_dir": "glue_dir/SST-2", "teacher_model": "bert_base_uncased_ft_sst", "fps_acc_dir": "output"},
    **{"train_batch_size": 32, "max_seq_length": 64, "do_lower_case": True, "aug_train": True, "amp": True},
    **{"device": "auto", "overwrite_output_dir": False},
}
FIRST = {**SST, "stage": Stage.INTERMEDIATE, "student_model": "general_tinybert", "opt_level": "O1"}
SECOND = {**SST, "stage": Stage.PREDICTION, "opt_level": "O2", "loss_scale": 128, "learning_rate": 3e-5}
SPEED = {"num_train_epochs": 1, "performance": True}
SETTINGS = {
    "train_performance_{}_1": {**FIRST, **SPEED, "output_dir": "tmp_tinybert_performance"},
    "train_performance_{}_2": {
        **{**SECOND, **SPEED, "student_model": "tmp_tinybert_performance"},
        **{"output_dir": "TinyBERT_dir_performance", "eval_step": 100},
    },
    "train_full_{}_1": {**FIRST, "num_train_epochs": 10, "performance": False, "output_dir": "tmp_tinybert_dir"},
    "train_full_{}_2": {
        **{**SECOND, "num_train_epochs": 3, "performance": False, "student_model": "tmp_tinybert_dir"},
        **{"output_dir": "TinyBERT_dir", "eval_step": 100},
    },
    "train_eval_{}": {
        **{"stage": Stage.EVALUATION, "data_dir": "glue_dir/SST-2", "student_model": "TinyBERT_dir", "amp": False},
        **{"output_dir": "result_dir", "eval_batch_size": 32, "max_seq_length": 64, "do_lower_case": True},
    },
}


@pytest.mark.parametrize("mode", ["1p", "8p"])
@pytest.mark.parametrize("name", SETTINGS)
def test_scripts_have_the_originals_settings(name, mode, tmp_path):
    (options,) = options_of(f"{name.format(mode)}.sh", tmp_path)
    devices, port = (tuple(range(8)), 12000) if mode == "8p" else ((0,), None)
    assert_options(options, **SETTINGS[name], device_list=devices, port=port)
    assert options.task.name == "SST-2"
    assert options.log_name(len(devices)) == name.format(mode)


def test_train_finetune_runs_both_stages_on_mnli(tmp_path):
    first, second = options_of("train_finetune_1p.sh", tmp_path)
    mnli = {"data_dir": "glue_dir/MNLI", "teacher_model": "bert_base_uncased_ft_mnli", "aug_train": False}
    shared = {**SST, **mnli, "transfer_learning": True, "opt_level": "O1"}
    between = "tmp_tinybert_finetune"
    assert_options(first, **shared, student_model="general_tinybert", output_dir=between, num_train_epochs=10)
    assert_options(second, **shared, student_model=between, output_dir="TinyBERT_dir_finetune", num_train_epochs=3)
    assert (first.task.name, second.task.name) == ("MNLI", "MNLI")
    assert (first.log_name(1), second.log_name(1)) == ("train_finetune_1p_1", "train_finetune_1p_2")


@pytest.mark.parametrize(("task", "folder"), [("SST-2", "sst"), ("MNLI", "mnli"), ("mnli", "mnli")])
def test_train_teacher_writes_the_folder_that_the_distillation_scripts_read(task, folder, tmp_path):
    (options,) = options_of("train_teacher_1p.sh", tmp_path, TASK_NAME=task)
    training = {"num_train_epochs": 3, "learning_rate": 2e-5, "train_batch_size": 32, "aug_train": False}
    folders = {"teacher_model": "bert_base_uncased", "output_dir": f"bert_base_uncased_ft_{folder}"}
    assert_options(options, stage=Stage.FINETUNE, **folders, **training)
    assert options.data_dir.name == options.task.name


@pytest.mark.parametrize("name", ["train_full_1p_1.sh", "train_performance_8p_2.sh"])
def test_variables_are_settings_and_flags_override_them(name, tmp_path):
    settings = {
        "DATA_DIR": ("data_dir", "my data"),
        "TEACHER_MODEL": ("teacher_model", "t"),
        "STUDENT_MODEL": ("student_model", "s"),
        "OUTPUT_DIR": ("output_dir", "o"),
        "FPS_ACC_DIR": ("fps_acc_dir", "f"),
        "DEVICE": ("device", "cpu"),
        "BATCH_SIZE": ("train_batch_size", 8),
        "MAX_SEQ_LENGTH": ("max_seq_length", 16),
        "LEARNING_RATE": ("learning_rate", 1e-3),
        "OPT_LEVEL": ("opt_level", "O0"),
        "SEED": ("seed", 7),
    }
    variables = {variable: value for variable, (_, value) in settings.items()}
    variables |= {"DEVICE_LIST": "0,1", "LOSS_SCALE": "dynamic", "AUG_TRAIN": 0, "DO_LOWER_CASE": 0, "EPOCHS": 7}
    flags = ("--num_train_epochs", "0.5", "--padding", "max_length")
    (options,) = options_of(name, tmp_path, *flags, **variables, OVERWRITE_OUTPUT_DIR=1)
    assert_options(options, **dict(settings.values()), num_train_epochs=0.5, padding="max_length")
    assert_options(options, device_list=(0, 1), loss_scale=None, aug_train=False, do_lower_case=None)
    assert options.overwrite_output_dir


QUICK = ("--num_train_epochs", "1", "--output_txt_step", "1")


def run_on(place: Workplace, name: str, *flags: str, **variables: object) -> Run:
    """Run a script on a workplace's data and models."""
    folders = {"DATA_DIR": place.data, "TEACHER_MODEL": place.teacher, "STUDENT_MODEL": place.student}
    sizes = {"MAX_SEQ_LENGTH": place.max_seq_length, "BATCH_SIZE": 3}
    settings = {**folders, **sizes, "FPS_ACC_DIR": place.output, "DEVICE": "cpu", "AUG_TRAIN": 0}
    return script(name, *flags, **{**settings, **variables})


class Chain:
    """All 1p scripts, one after another, on a tiny case."""

    def __init__(self, folder: Path) -> None:
        self.place = cases.Golden("sst2_small").workplace(folder)
        names = ("new teacher", "tmp_tinybert_dir", "TinyBERT_dir", "result_dir")
        self.teacher, self.between, self.student, self.result = (folder / name for name in names)
        second = {"TEACHER_MODEL": self.teacher, "STUDENT_MODEL": self.between, "OUTPUT_DIR": self.student}
        self.runs = [
            run_on(self.place, "train_teacher_1p.sh", *QUICK, OUTPUT_DIR=self.teacher),
            self.run_first_stage(),
            run_on(self.place, "train_full_1p_2.sh", *QUICK, **second),
            run_on(self.place, "train_eval_1p.sh", STUDENT_MODEL=self.student, OUTPUT_DIR=self.result),
            script("demo.sh", "--text", "a film", "--text", "", STUDENT_MODEL=self.student),
        ]

    def run_first_stage(self, **variables: object) -> Run:
        folders = {"TEACHER_MODEL": self.teacher, "OUTPUT_DIR": self.between}
        return run_on(self.place, "train_full_1p_1.sh", *QUICK, **folders, **variables)

    def logs(self) -> dict[str, list[str]]:
        return {path.name: path.read_text().splitlines() for path in self.place.output.glob("*.txt")}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_the_1p_scripts_run_from_teacher_to_demo_and_each_writes_its_log(chain):
    assert [(run.status, run.err) for run in chain.runs] == [(0, "")] * 5
    assert "acc = " in (chain.result / "eval_results.txt").read_text()
    assert "20 repetitions" in chain.runs[-1].out
    logs = chain.logs()
    assert {"train_teacher_1p.txt", "train_full_1p_1.txt", "train_full_1p_2.txt", "train_eval_1p.txt"} == set(logs)
    assert len(logs["train_full_1p_2.txt"]) == 3  # eight examples in batches of three
    assert "acc" in logs["train_full_1p_2.txt"][-1]


def test_a_second_run_needs_overwrite_output_dir_and_appends_to_the_log(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.place.folder.rglob("*")}
    lines = chain.logs()["train_full_1p_1.txt"]
    refused = chain.run_first_stage()
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "OVERWRITE_OUTPUT_DIR=1" in refused.err
    assert {path: path.stat().st_mtime_ns for path in chain.place.folder.rglob("*")} == before

    again = chain.run_first_stage(OVERWRITE_OUTPUT_DIR=1)
    assert (again.status, again.err) == (0, "")
    after = chain.logs()["train_full_1p_1.txt"]
    assert (after[: len(lines)], len(after)) == (lines, 2 * len(lines))


def test_transfer_learning_takes_a_student_with_another_number_of_labels(mnli, tmp_path):
    def two_labels(weights: dict[str, torch.Tensor]) -> None:
        hidden = weights["bert.pooler.dense.bias"].shape[0]
        weights |= {"classifier.weight": torch.zeros(2, hidden), "classifier.bias": torch.zeros(2)}

    cases.edit_weights(mnli.student, two_labels)
    student = tmp_path / "TinyBERT_dir_finetune"
    done = run_on(mnli, "train_finetune_1p.sh", *QUICK, INTERMEDIATE_DIR=tmp_path / "between", OUTPUT_DIR=student)
    assert (done.status, done.err) == (0, "")
    assert cases.read_bin(student)["classifier.weight"].shape[0] == 3
    assert {path.name for path in mnli.output.glob("*.txt")} == {"train_finetune_1p_1.txt", "train_finetune_1p_2.txt"}


def test_a_missing_file_is_one_line_and_nothing_is_written(sst2):
    before = sorted(sst2.folder.rglob("*"))
    done = run_on(sst2, "train_full_1p_1.sh", OUTPUT_DIR=sst2.model, AUG_TRAIN=1)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "train_aug.tsv" in done.err
    assert "AUG_TRAIN=0" in done.err
    assert sorted(sst2.folder.rglob("*")) == before


RUN = [name for name in SCRIPTS if name.startswith(("train_", "augment", "demo"))]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("folder", ["test", "elsewhere"])
def test_default_folders_are_in_the_root_from_any_folder(name, folder, tmp_path):
    """Each argument that is a path of the repository from its root is the same path from another folder."""
    python = stand_in_python(tmp_path, 'printf "%s\\n" "$@"')
    (tmp_path / "elsewhere").mkdir()
    cwd = {"test": TEST, "elsewhere": tmp_path / "elsewhere"}[folder]
    at_root, elsewhere = (script(name, cwd=cwd, PYTHON=python) for cwd in (ROOT, cwd))
    assert (elsewhere.status, elsewhere.err) == (0, "")
    pairs = zip(at_root.out.splitlines(), elsewhere.out.splitlines(), strict=True)
    assert all(there in (here, f"{ROOT}/{here}") for here, there in pairs)
    assert elsewhere.out.count(f"{ROOT}/") >= 2
    here = [
        line for line in at_root.out.splitlines() if line.startswith(("glue_dir", "output", "TinyBERT_dir", "main.py"))
    ]
    assert here
    assert not set(here) & set(elsewhere.out.splitlines())


def test_paths_in_variables_and_flags_mean_the_current_folder(sst2):
    folders = {"DATA_DIR": "data", "TEACHER_MODEL": "teacher", "STUDENT_MODEL": "./student", "FPS_ACC_DIR": "output"}
    sizes = {"MAX_SEQ_LENGTH": sst2.max_seq_length, "BATCH_SIZE": 8, "DEVICE": "cpu", "AUG_TRAIN": 0}
    flags = (*QUICK, "--output_dir", "model", "--cache_dir", "my cache")
    done = script("train_full_1p_1.sh", *flags, cwd=sst2.folder, CDPATH="/", **folders, **sizes)
    assert (done.status, done.err) == (0, "")
    assert (sst2.model / "pytorch_model.bin").is_file()
    assert (sst2.output / "train_full_1p_1.txt").is_file()
    assert (sst2.folder / "my cache").is_dir()


@pytest.mark.parametrize("name", ["quickstart.sh", "setup_env.sh"])
def test_a_mistake_from_another_folder_is_one_line(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    done = script(name, "no such file", cwd=tmp_path, QUICKSTART_DIR="mine", PYTHON=sys.executable)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)


def sourced(name: str, **variables: object) -> Run:
    """Source an environment script as the others do, then print its variables and bash's options."""
    names = "TOOLKIT ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL TASK_QUEUE_ENABLE HCCL_WHITELIST_DISABLE"
    program = f'set -euo pipefail; source test/{name}; for v in {names}; do echo "$v=${{!v-}}"; done; echo "$-"'
    return bash("-c", program, HOME="/nonexistent", **variables)


@pytest.mark.parametrize("name", ["env_npu_1p.sh", "env_npu_8p.sh"])
def test_the_npu_environment_is_empty_and_silent_without_a_toolkit(name):
    done = sourced(name)
    assert done.status == 0
    if Path("/usr/local/Ascend").exists():
        report_lack("an environment without an Ascend toolkit")
        return
    assert done.err == ""
    assert all(line.endswith("=") for line in done.out.splitlines()[:-1])


@pytest.mark.parametrize(("name", "whitelist"), [("env_npu_1p.sh", ""), ("env_npu_8p.sh", "1")])
def test_the_npu_environment_is_set_with_a_toolkit(name, whitelist, tmp_path):
    """Whose script may read unset variables and end with a failing test."""
    (tmp_path / "set_env.sh").write_text('export TOOLKIT="found${UNSET_VARIABLE}"\n[ -d /nonexistent ]\n')
    done = sourced(name, ASCEND_TOOLKIT_HOME=tmp_path, ASCEND_GLOBAL_LOG_LEVEL=1)
    *values, shell_options = done.out.splitlines()
    assert [value.partition("=")[2] for value in values] == ["found", "0", "1", "1", whitelist]
    assert {"e", "u"} <= set(shell_options)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_begin_with_a_description_and_stop_at_the_first_error(name):
    content = (TEST / name).read_text(encoding="utf-8")
    assert content.startswith("#!/usr/bin/env bash\n# ")
    assert name.startswith(("env_npu", "common")) or "\nset -euo pipefail\n" in content
