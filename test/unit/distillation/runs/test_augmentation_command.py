"""data_augmentation.py as a command: the files of every task, processes, --relabel, the script, mistakes."""

import argparse
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import cases
import glue_rows
import numpy as np
import pytest
import torch
from augmentation_cases import SENTENCES, Place, many_rows, masked_lm
from cases import ROOT, command, edit_config, edit_weights, write_rows

from data_processing.examples import TextRows, read_examples
from data_processing.tables import ENCODING
from data_processing.task_files import read_task_file
from data_processing.tasks import TASKS, augmentation_command, find_task
from distillation.runs.augment_options import build_augment_parser
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

N = {"CoLA": 30, "MNLI": 10, "MRPC": 30, "SST-2": 20, "STS-B": 30, "QQP": 10, "QNLI": 20, "RTE": 30}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_flags_have_the_originals_defaults():
    flags = build_augment_parser().parse_args(["--pretrained_bert_model", "bert"])
    assert (flags.N, flags.M, flags.p, flags.seed, flags.mlm_context) == (None, 15, 0.4, 42, "original")
    assert {task.name: task.augmentation_n for task in TASKS} == N | {"MNLI-mm": 10, "WNLI": None}


def test_each_text_is_followed_by_at_most_n_new_texts(place):
    """The unchanged row comes first; new texts are lower-cased basic tokens, all different."""
    place.run(N=7)
    assert place.lines()[0] == "sentence\tlabel"
    rest = place.lines()[1:]
    for text, label in SENTENCES:
        assert rest.pop(0) == f"{text}\t{label}"
        new = []
        while rest and not any(rest[0].startswith(other + "\t") for other, _ in SENTENCES):
            new.append(rest.pop(0))
        assert len(new) == len(set(new)) <= 7
        assert all(line.endswith(f"\t{label}") and line == line.lower() for line in new)
        assert text.lower() not in [line.split("\t")[0] for line in new]
        assert bool(new) == (text != "it is not")


def test_quotation_marks_stay_as_they_were_read(tmp_path):
    """Trap 37: single, at the beginning, doubled; bytes that are not UTF-8 too."""
    place = Place(tmp_path)
    lines = [b"sentence\tlabel", b'"bad movie\t0', b'a ""great"" film\t1', b'"a movie"\t1', b"dull \xff film\t0"]
    (place.data / "train.tsv").write_bytes(b"\n".join(lines) + b"\n")
    place.run(N=5)
    made = place.made.read_bytes().splitlines()
    assert all(line in made for line in lines)
    assert not any(b'""' in line for line in made if b"great" not in line and line not in lines)
    assert any(line.startswith(b'" ') and line not in lines for line in made)


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_new_rows_of_every_task_differ_from_their_row_in_one_text(tmp_path, name):
    """Trap 38: --N has an effect, STS-B is known, and labels and other columns are kept."""
    glue, _ = glue_rows.workplace(tmp_path / "case", name)
    place = Place(tmp_path / "place")
    folder = place.folder / "glue" / ("MNLI" if name == "MNLI-mm" else name)
    folder.mkdir(exist_ok=True)
    source = (glue.data / "train.tsv").read_text(encoding="utf-8")
    (folder / "train.tsv").write_text(source, encoding="utf-8")
    place.run(task_name=name.lower(), N=4 if name == "WNLI" else None)
    task = find_task(name)
    before, after = (read_examples(folder / file, task) for file in ("train.tsv", "train_aug.tsv"))
    made = (folder / "train_aug.tsv").read_text(encoding="utf-8")
    if task.has_header:
        assert made.splitlines()[0] == source.splitlines()[0]
    originals = list(zip(*before.texts, before.labels.tolist(), strict=True))
    number, count = -1, 0
    for row in zip(*after.texts, after.labels.tolist(), strict=True):
        if number + 1 < len(originals) and row == originals[number + 1]:
            number, count = number + 1, 0
            continue
        count += 1
        assert row[-1] == originals[number][-1]
        assert sum(a != b for a, b in zip(row, originals[number], strict=True)) == 1
        assert count <= len(task.text_columns) * (4 if name == "WNLI" else N.get(name, 10))
    assert number == len(originals) - 1
    assert len(after) > 2 * len(before)
    cells = {
        tuple(c for n, c in enumerate(line.split("\t")) if n not in task.text_columns) for line in made.splitlines()
    }
    assert cells == {
        tuple(c for n, c in enumerate(line.split("\t")) if n not in task.text_columns) for line in source.splitlines()
    }


@pytest.mark.parametrize(("form", "header"), [("csv", True), ("csv", False), ("jsonl", True)])
def test_a_users_own_task_is_augmented(tmp_path, form, header):
    place = Place(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    rows = [
        {"id": 7, "text": 'a "great", warm movie', "label": "good"},
        {"id": 8, "text": "sad\ndull plot", "label": "bad"},
    ]
    if form == "jsonl":
        (own / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = ["id,text,label"] * header + ['7,"a ""great"", warm movie",good', '8,"sad\ndull plot",bad']
        (own / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {"text": "text", "label": "label"} if header else {"text": 1, "label": 2, "header": False}
    task = {"name": "own", "train": f"train.{form}", "dev": f"dev.{form}", "labels": ["good", "bad"], **names}
    (own / "task.json").write_text(json.dumps(task), encoding="utf-8")
    assert "--N" in place.fails(task_name=None, glue_dir=None, task_file=own / "task.json")
    place.run(task_name=None, glue_dir=None, task_file=own / "task.json", N=6)
    after = read_examples(own / f"train_aug.{form}", read_task_file(own / "task.json"))
    assert after.texts[0][0] == rows[0]["text"]
    assert rows[1]["text"] in after.texts[0]
    assert sorted(set(after.labels.tolist())) == [0, 1]
    assert len(after) > 4
    if form == "jsonl":
        ids = [json.loads(line)["id"] for line in (own / "train_aug.jsonl").read_text().splitlines()]
        assert set(ids) == {7, 8}


def test_lone_surrogates_in_json_lines_are_replaced_and_other_bytes_are_kept(tmp_path):
    task = find_task("SST-2")
    task = replace(task, form="jsonl", text_columns=("text",), label_column="label", has_header=False)
    line = rb'{"text": "a \ud83d b", "label": "1", "\ud83d": [{"\udc00": "\udfff\ud83d\ude00 \u00e9 \ud83d"}], "x": "'
    (tmp_path / "train.jsonl").write_bytes(line + b'\xff", "n": [1, null, 0.5]}\n')
    rows = TextRows(tmp_path / "train.jsonl", task)
    (row,) = rows
    written = rows.format_row(row, ("new",)).encode(*ENCODING)
    assert b'"x": "\xff"' in written
    assert json.loads(written.replace(b"\xff", b"")) == {
        "text": "new",
        "label": "1",
        "\ufffd": [{"\ufffd": "\ufffd\U0001f600 é \ufffd"}],
        "x": "",
        "n": [1, None, 0.5],
    }
    assert row.texts == ("a \ufffd b",)


def test_incomplete_rows_that_a_task_skips_are_not_augmented(tmp_path):
    place = Place(tmp_path)
    rows = [
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["1", "2", "3", "movie", "film", "1"],
        ["4", "5"],
    ]
    write_rows(place.folder / "glue" / "QQP" / "train.tsv", rows)
    place.run(task_name="qqp")
    assert all(
        line.startswith("1\t2\t3\t") for line in (tmp_path / "glue/QQP/train_aug.tsv").read_text().splitlines()[1:]
    )


def test_the_file_depends_on_the_seed_and_not_on_the_numbers_of_processes_and_threads(place, monkeypatch):
    """With rows for several blocks."""
    write_rows(place.data / "train.tsv", many_rows(1300))
    made = {}
    for name, changes in {
        "one": {},
        "again": {},
        "two processes": {"device_list": "0,1"},
        "seed": {"seed": 43},
        "bf16": {"precision": "bf16"},
        "bf16, two processes": {"precision": "bf16", "device_list": "0,1"},
    }.items():
        place.run(N=2, overwrite_output_file=name != "one", **{"precision": "fp32", **changes})
        made[name] = place.made.read_bytes()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for precision in ("fp32", "bf16"):
        place.run(N=2, overwrite_output_file=True, precision=precision)
        made[f"three threads, {precision}"] = place.made.read_bytes()
    assert made["one"] == made["again"] == made["two processes"] == made["three threads, fp32"]
    assert made["bf16"] == made["bf16, two processes"] == made["three threads, bf16"]
    assert made["one"] != made["seed"]


def test_the_command_runs_as_a_script_and_as_a_module(place):
    for start in (
        [str(ROOT / "data_processing" / "data_augmentation.py")],
        ["-m", "data_processing.data_augmentation"],
    ):
        done = command(*start, *place.flags(N=2, overwrite_output_file=True), cwd=place.folder)
        assert done.status == 0, done.err
        assert "train_aug.tsv: 5 rows became" in done.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": 0}, "--N 0: expected 1 to 10000"),
        ({"M": -1}, "--M -1"),
        ({"p": 0}, "--p 0.0"),
        ({"p": 1.5}, "--p 1.5"),
        ({"p": "nan"}, "--p nan"),
        ({"seed": -1}, "--seed -1"),
        ({"task_name": "WNLI"}, "--N: WNLI has no default"),
        ({"task_name": "STT-2"}, "no such task"),
        ({"task_name": None}, "give one of --task_name and --task_file"),
        ({"glue_dir": None}, "--glue_dir"),
        ({"glue_dir": "/none"}, "/none: no such folder"),
        ({"task_name": "MRPC"}, "MRPC: no such folder"),
        ({"glove_embs": None}, "--no_glove"),
        ({"glove_embs": "/none.txt"}, "/none.txt: not found"),
        ({"pretrained_bert_model": "/none"}, "/none: no such folder"),
        ({"relabel": "teacher"}, "--teacher_model"),
        ({"train_mlm_head": 0}, "--train_mlm_head 0"),
        ({"device_list": "0,0"}, "--device_list 0,0"),
        ({"device_list": "a"}, "--device_list a"),
        ({"mlm_context": "none"}, "--mlm_context"),
    ],
    ids=str,
)
def test_a_mistake_in_the_flags_is_one_line(place, changes, message):
    assert message in place.fails(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no examples"),
        (b"sentence\tlabel\n", "holds no examples"),
        (b"sentence\tlabel\na movie\t2\n", "row 2: the label is '2'"),
        (b"sentence\tlabel\na movie\t1\na movie\n", "row 3: has 1 column"),
        (b"a movie\t1\na film\t0\n", "row 1: is an example"),
    ],
)
def test_a_broken_training_file_is_an_error(place, content, message):
    (place.data / "train.tsv").write_bytes(content)
    assert message in place.fails()


def test_unsuitable_masked_language_models_are_refused(place, tmp_path):
    bare = masked_lm(tmp_path / "bare", head=False)
    assert "no masked-LM head" in (message := place.fails(pretrained_bert_model=bare))
    assert "--train_mlm_head" in message
    one = masked_lm(tmp_path / "one", type_vocab_size=1)
    assert "--mlm_context masked" in place.fails(pretrained_bert_model=one)
    place.run(pretrained_bert_model=one, mlm_context="masked")
    short = masked_lm(tmp_path / "short")
    edit_config(short, vocab_size=50)
    assert "vocabulary has 100 tokens" in place.fails(pretrained_bert_model=short, overwrite_output_file=True)
    half = masked_lm(tmp_path / "half")
    edit_weights(half, lambda weights: weights.pop("cls.predictions.bias"))
    assert "the masked-LM head lacks cls.predictions.bias" in place.fails(
        pretrained_bert_model=half, overwrite_output_file=True
    )
    words = (place.bert / "vocab.txt").read_text().replace("[MASK]", "mask")
    (place.bert / "vocab.txt").write_text(words)
    assert "has no [MASK]" in place.fails(overwrite_output_file=True)


def test_without_vectors_words_of_several_wordpieces_are_kept(place):
    place.run(glove_embs=None, no_glove=True)
    for line in place.lines()[1:]:
        words = line.split("\t")[0].split()
        assert not {"quickly", "slow", "loving", "unwanted"} & set(words)
        assert len(words) != 6 or words[0] == "a" or words[1] == "unwantable"  # of the third sentence


def test_relabel_drops_new_texts_with_another_teacher_label(place, tmp_path):
    """Exactly the new texts to which the teacher, run on one text, gives another label than to the row's text."""
    golden = cases.Golden("sst2_small").workplace(tmp_path / "golden")
    tokenizer = BertTokenizer.from_pretrained(golden.teacher)

    def margin(line: str) -> float:
        """Return the second logit less the first that the teacher gives for a line's text alone."""
        ids = [tokenizer.cls_token_id, *tokenizer.encode_batch([line.split("\t")[0]])[0], tokenizer.sep_token_id]
        with torch.no_grad():
            first, second = teacher(torch.tensor([ids])).logits[0].tolist()
        return second - first

    place.run(precision="fp32")
    everything = place.lines()[1:]
    teacher = TinyBertForSequenceClassification.from_pretrained(golden.teacher).eval()
    middle = float(np.median([margin(line) for line in everything])) + 1e-4
    edit_weights(golden.teacher, lambda weights: weights["classifier.bias"].add_(torch.tensor([middle, 0.0])))
    log = place.run(relabel="teacher", teacher_model=golden.teacher, overwrite_output_file=True, precision="fp32").out
    originals, expected, label = ["\t".join(row) for row in SENTENCES], [], False
    for line in everything:
        if line in originals:
            label = margin(line) > middle
        if (margin(line) > middle) == label:
            expected.append(line)
    assert place.lines()[1:] == expected
    assert len(SENTENCES) < len(expected) < len(everything)
    assert f"{len(everything) - len(expected)} more were left out" in log
    (place.folder / "glue" / "STS-B").mkdir()
    assert "is a regression" in place.fails(task_name="STS-B", relabel="teacher", teacher_model=golden.teacher)


def test_a_missing_augmented_file_names_the_command_that_makes_it(place, sst2):
    """The parser accepts the command in the message of --aug_train; a user's own task gets --task_file."""
    message = sst2.fails(aug_train=True)
    command = message.partition("or make it: python data_processing/data_augmentation.py ")[2].split()
    flags = build_augment_parser().parse_args(command)
    assert (flags.task_name, flags.data_dir) == ("SST-2", sst2.data)
    own = augmentation_command(replace(find_task("SST-2"), name="own", augmentation_n=None), Path("d"))
    assert "--task_file FILE --data_dir d" in own
    assert "--N " in own


def test_every_setting_of_augment_1p_is_a_variable(tmp_path):
    """The default is SST-2 with the command's defaults."""
    record = tmp_path / "command"
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{record}"\n')
    recorder.chmod(0o755)

    def flags_of_script(**variables: str) -> argparse.Namespace:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(recorder), **variables}
        subprocess.run(
            ["bash", str(ROOT / "test" / "augment_1p.sh")], cwd=ROOT, env=environment, check=True, timeout=60
        )
        first, *flags = record.read_text().splitlines()
        assert first == "data_processing/data_augmentation.py"
        return build_augment_parser().parse_args(flags)

    plain = flags_of_script()
    assert (plain.task_name, plain.data_dir, plain.do_lower_case) == ("SST-2", Path("glue_dir/SST-2"), True)
    assert (plain.pretrained_bert_model, plain.glove_embs) == (Path("bert_base_uncased"), Path("glove.6B.300d.txt"))
    assert (plain.N, plain.M, plain.p, plain.seed, plain.mlm_context) == (None, 15, 0.4, 42, "original")
    assert {plain.resume, plain.overwrite_output_file, plain.no_glove} == {False}
    other = flags_of_script(
        TASK_NAME="RTE",
        DATA_DIR="d",
        BERT_MODEL="b",
        GLOVE_EMBS="",
        N="3",
        M="4",
        P="0.5",
        MLM_CONTEXT="masked",
        TRAIN_MLM_HEAD="9",
        RELABEL_BY="t",
        RESUME="1",
        DO_LOWER_CASE="0",
        SEED="7",
        DEVICE="cpu",
        DEVICE_LIST="0,1",
    )
    assert (other.task_name, other.data_dir, other.pretrained_bert_model) == ("RTE", Path("d"), Path("b"))
    assert (other.N, other.M, other.p, other.seed, other.mlm_context) == (3, 4, 0.5, 7, "masked")
    assert (other.train_mlm_head, other.teacher_model, other.relabel) == (9, Path("t"), "teacher")
    assert (other.device, other.device_list, other.do_lower_case) == ("cpu", "0,1", False)
    assert other.resume
    assert other.no_glove
    assert flags_of_script(OVERWRITE_OUTPUT_FILE="1").overwrite_output_file
