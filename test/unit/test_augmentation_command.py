"""data_augmentation.py as a command: files of every task, stops and resumption, processes, mistakes."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import augmentation_cases
import cases
import glue_rows
import numpy as np
import pytest
import torch
from augmentation_cases import SENTENCES, Place, masked_lm
from cases import ROOT, command, edit_config, edit_weights, write_rows

from data_processing.data_augmentation import build_parser
from data_processing.examples import read_examples
from data_processing.task_files import read_task_file
from data_processing.tasks import TASKS, find_task
from data_processing.unfinished import UnfinishedFile
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

N = {"CoLA": 30, "MNLI": 10, "MRPC": 30, "SST-2": 20, "STS-B": 30, "QQP": 10, "QNLI": 20, "RTE": 30}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def many_rows(count: int) -> list[tuple[str, str]]:
    choose = random.Random(3)
    words = [word for word in augmentation_cases.VOCABULARY[5:60] if word.isalpha()] + ["slowly", "hating"]
    rows = [(" ".join(choose.choices(words, k=choose.randint(1, 5))), str(n % 2)) for n in range(count)]
    return [("sentence", "label"), *rows]


def test_flags_have_the_originals_defaults():
    flags = build_parser().parse_args(["--pretrained_bert_model", "bert"])
    assert (flags.N, flags.M, flags.p, flags.seed, flags.mlm_context) == (None, 15, 0.4, 42, "original")
    assert {task.name: task.augmentation_n for task in TASKS} == N | {"MNLI-mm": 10, "WNLI": None}


def test_each_text_is_followed_by_its_new_ones(place):
    """The original as it stands comes first; the others are lower-cased basic tokens; N of the flags counts."""
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
    """Trap 37: single, at the beginning, doubled; and bytes that are not UTF-8."""
    place = Place(tmp_path)
    lines = [b"sentence\tlabel", b'"bad movie\t0', b'a ""great"" film\t1', b'"a movie"\t1', b"dull \xff film\t0"]
    (place.data / "train.tsv").write_bytes(b"\n".join(lines) + b"\n")
    place.run(N=5)
    made = place.made.read_bytes().splitlines()
    assert all(line in made for line in lines)
    assert not any(b'""' in line for line in made if b"great" not in line and line not in lines)
    assert any(line.startswith(b'" ') and line not in lines for line in made)


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_every_tasks_columns_are_kept_and_read(tmp_path, name):
    """Trap 38: --N is what is given, and STS-B is found; both sides of pairs, labels and other columns."""
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
def test_a_task_of_ones_own(tmp_path, form, header):
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


def test_rows_that_a_task_leaves_out_are_left_out(tmp_path):
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


def test_a_seed_gives_one_file_whatever_the_number_of_processes_and_threads(place, monkeypatch):
    """Over several blocks; another seed gives another file."""
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


def test_it_runs_as_a_script_and_as_a_module(place):
    for start in (
        [str(ROOT / "data_processing" / "data_augmentation.py")],
        ["-m", "data_processing.data_augmentation"],
    ):
        done = command(*start, *place.flags(N=2, overwrite_output_file=True), cwd=place.folder)
        assert done.status == 0, done.err
        assert "train_aug.tsv: 5 rows became" in done.out


def run_and_stop(place: Place, seconds: float, how: int, **changes) -> tuple[int, str]:
    """Starts the command and stops it once it has worked for so long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        place.command(**changes), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True
    )
    journal = place.data / "train_aug.tsv.unfinished" / "journal.json"
    before = journal.read_bytes() if journal.exists() else None
    while process.poll() is None and (not journal.exists() or journal.read_bytes() == before):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_killed_at_random_moments_it_goes_on_to_the_same_file(place, devices):
    write_rows(place.data / "train.tsv", many_rows(2100))
    changes = {"N": 3, "precision": "fp32", "device_list": devices}
    place.run(**changes)
    undisturbed = place.made.read_bytes()
    place.made.unlink()
    choose, stops = random.Random(os.urandom(8)), 0
    while not place.made.exists():
        resumed = (place.data / "train_aug.tsv.unfinished").exists()
        status, err = run_and_stop(place, choose.uniform(0.0, 0.3), signal.SIGKILL, resume=resumed, **changes)
        assert status in (0, -signal.SIGKILL), err
        stops += status != 0
    assert stops >= 1
    assert place.made.read_bytes() == undisturbed
    assert sorted(path.name for path in place.data.iterdir()) == ["train.tsv", "train_aug.tsv"]


def unfinished(place: Place) -> Path:
    """A run that was killed after its first block."""
    write_rows(place.data / "train.tsv", many_rows(2100))
    status, err = run_and_stop(place, 0.0, signal.SIGKILL, N=3)
    assert status == -signal.SIGKILL, err
    folder = place.data / "train_aug.tsv.unfinished"
    if json.loads((folder / "journal.json").read_text())["blocks"] == 0:
        run_and_stop(place, 0.0, signal.SIGKILL, N=3, resume=True)
    return folder


@pytest.mark.slow
def test_an_unfinished_run_is_kept_until_the_flags_say_what_to_do(place):
    folder = unfinished(place)
    assert "holds an unfinished run" in (told := place.fails(N=3))
    assert "--resume goes on with it, --overwrite_output_file begins anew" in told
    assert "was begun with --N 3, now it is 4" in place.fails(N=4, resume=True)
    assert "either --resume or" in place.fails(N=3, resume=True, overwrite_output_file=True)
    rows = (folder / "rows").read_bytes()
    (folder / "rows").write_bytes(rows + b"half a li")
    place.run(N=3, resume=True)
    resumed = place.made.read_bytes()
    place.run(N=3, overwrite_output_file=True)
    assert place.made.read_bytes() == resumed
    assert resumed.startswith(rows[: len(rows) // 2])


@pytest.mark.slow
def test_changed_inputs_are_told(place):
    unfinished(place)
    with (place.data / "train.tsv").open("a") as file:
        file.write("a new row\t1\n")
    assert "the content of train.tsv" in place.fails(N=3, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_a_signal_ends_it_with_a_line_that_says_how_to_go_on(place, how, devices):
    write_rows(place.data / "train.tsv", many_rows(2100))
    status, err = run_and_stop(place, 0.1, how, N=3, device_list=devices)
    assert status == 128 + how, err
    assert err.count("\n") == 1
    assert "stopped; " in err


def test_an_existing_file_is_not_lost(place):
    place.made.write_text("mine\n")
    assert "is there already; --overwrite_output_file" in place.fails()
    assert "is there already" in place.fails(resume=True)
    assert place.made.read_text() == "mine\n"
    place.run(overwrite_output_file=True)
    assert len(place.lines()) > len(SENTENCES)


def test_two_runs_at_once_are_refused(place):
    first = UnfinishedFile(place.made)
    first.open(False, False)
    assert "another run is making it" in place.fails()
    first.close()
    place.run()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"N": 0}, "--N 0: expected 1 or more"),
        ({"M": -1}, "--M -1"),
        ({"p": 0}, "--p 0.0"),
        ({"p": 1.5}, "--p 1.5"),
        ({"p": "nan"}, "--p nan"),
        ({"seed": -1}, "--seed -1"),
        ({"task_name": "WNLI"}, "--N: WNLI has no number of its own"),
        ({"task_name": "STT-2"}, "no such task"),
        ({"task_name": None}, "give one of --task_name and --task_file"),
        ({"glue_dir": None}, "--glue_dir"),
        ({"glue_dir": "/none"}, "/none: no such folder"),
        ({"task_name": "MRPC"}, "MRPC: no such folder"),
        ({"glove_embs": None}, "--no_glove"),
        ({"glove_embs": "/none.txt"}, "/none.txt: not found"),
        ({"pretrained_bert_model": "/none"}, "/none: no such folder"),
        ({"relabel": "teacher"}, "belong together"),
        ({"train_mlm_head": 0}, "--train_mlm_head 0"),
        ({"device_list": "0,0"}, "--device_list 0,0"),
        ({"device_list": "a"}, "--device_list a"),
        ({"mlm_context": "none"}, "--mlm_context"),
        ({"resume": True}, "no unfinished run"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(place, changes, told):
    assert told in place.fails(**changes)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no examples"),
        (b"sentence\tlabel\n", "holds no examples"),
        (b"sentence\tlabel\na movie\t2\n", "row 2: the label is '2'"),
        (b"sentence\tlabel\na movie\t1\na movie\n", "row 3: has 1 column"),
        (b"a movie\t1\na film\t0\n", "row 1: is an example"),
    ],
)
def test_a_broken_training_file_is_told(place, content, told):
    (place.data / "train.tsv").write_bytes(content)
    assert told in place.fails()


def test_models_that_cannot_serve_are_refused(place, tmp_path):
    bare = masked_lm(tmp_path / "bare", head=False)
    assert "no masked-LM head" in (told := place.fails(pretrained_bert_model=bare))
    assert "--train_mlm_head" in told
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


def test_without_vectors_words_of_several_pieces_stay(place):
    place.run(glove_embs=None, no_glove=True)
    for line in place.lines()[1:]:
        words = line.split("\t")[0].split()
        assert not {"quickly", "slow", "loving", "unwanted"} & set(words)
        if "good" in words[-1:]:
            assert "slowly" in words


def test_the_teacher_drops_what_turns_its_class(place, tmp_path):
    """--relabel: exactly the new texts that the teacher, asked alone, puts into another class are gone."""
    golden = cases.Golden("sst2_small").workplace(tmp_path / "golden")
    tokenizer = BertTokenizer.from_pretrained(golden.teacher)

    def leaning(line: str) -> float:
        """How much more the teacher, asked alone, takes a line's text for the second class than for the first."""
        ids = [tokenizer.cls_token_id, *tokenizer.encode_batch([line.split("\t")[0]])[0], tokenizer.sep_token_id]
        with torch.no_grad():
            first, second = teacher(torch.tensor([ids])).logits[0].tolist()
        return second - first

    place.run(precision="fp32")
    everything = place.lines()[1:]
    teacher = TinyBertForSequenceClassification.from_pretrained(golden.teacher).eval()
    middle = float(np.median([leaning(line) for line in everything])) + 1e-4
    edit_weights(golden.teacher, lambda weights: weights["classifier.bias"].add_(torch.tensor([middle, 0.0])))
    said = place.run(relabel="teacher", teacher_model=golden.teacher, overwrite_output_file=True, precision="fp32").out
    originals, expected, own = ["\t".join(row) for row in SENTENCES], [], False
    for line in everything:
        if line in originals:
            own = leaning(line) > middle
        if (leaning(line) > middle) == own:
            expected.append(line)
    assert place.lines()[1:] == expected
    assert len(SENTENCES) < len(expected) < len(everything)
    assert f"{len(everything) - len(expected)} more were left out" in said
    (place.folder / "glue" / "STS-B").mkdir()
    assert "is a regression" in place.fails(task_name="STS-B", relabel="teacher", teacher_model=golden.teacher)
