"""A user's mistake is one line with the flag or file, exit status 2, and nothing is written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from cases import (
    ROOT,
    Workplace,
    call,
    command,
    edit_config,
    edit_weights,
    encoder_shapes,
    linear,
    weights_of,
    write_rows,
)

import main


def remove(path: str):
    def change(place: Workplace) -> None:
        target = place.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def empty(path: str):
    """Return a change that empties a folder or file."""

    def change(place: Workplace) -> None:
        target = place.folder / path
        if target.is_dir():
            shutil.rmtree(target)
            target.mkdir()
        else:
            target.write_bytes(b"")

    return change


def write(path: str, content: bytes):
    return lambda place: (place.folder / path).write_bytes(content)


def rows(path: str, *lines: list[str]):
    return lambda place: write_rows(place.folder / path, [["sentence", "label"], *lines])


def weights(model: str, change):
    return lambda place: edit_weights(place.folder / model, change)


def config(model: str, **changes):
    return lambda place: edit_config(place.folder / model, **changes)


def without_heads(tensors: dict) -> None:
    for key in [key for key in tensors if not key.startswith("bert.")]:
        del tensors[key]


def without_pooler(tensors: dict) -> None:
    for key in [key for key in tensors if "pooler" in key]:
        del tensors[key]


def bare(tensors: dict) -> None:
    """Remove the heads and the prefix `bert.`, as encoders without heads are stored."""
    without_heads(tensors)
    for key in list(tensors):
        tensors[key.removeprefix("bert.")] = tensors.pop(key)


def student_of(**changes):
    """Return a change that replaces the student by one with these entries in config.json and fitting weights."""

    def change(place: Workplace) -> None:
        edit_config(place.student, **changes)
        values = json.loads((place.student / "config.json").read_text(encoding="utf-8"))
        shapes = encoder_shapes(values) | linear("classifier", values["hidden_size"], 2)
        torch.save(weights_of(shapes), place.student / "pytorch_model.bin")

    return change


def swapped_words(place: Workplace) -> None:
    path = place.student / "vocab.txt"
    words = path.read_text(encoding="utf-8").splitlines()
    words[10], words[11] = words[11], words[10]
    path.write_text("\n".join(words), encoding="utf-8")


def nothing(place: Workplace) -> None:
    """Change nothing: the mistake is in the flags."""


EVAL = {"do_eval": True, "teacher_model": None}
PREDICTION = {"pred_distill": True}
FINETUNE = {"do_finetune": True, "student_model": None}

# id: (change of the folders, flags, part of the message)
FOLDERS = {
    "no data folder": (remove("data"), {}, "data: no such folder; --data_dir holds train.tsv"),
    "no data folder, evaluating": (remove("data"), EVAL, "dev.tsv: not found"),
    "empty data folder": (empty("data"), {}, "train.tsv: not found"),
    "no train file": (remove("data/train.tsv"), {}, "train.tsv: not found"),
    "no dev file": (remove("data/dev.tsv"), {}, "dev.tsv: not found"),
    "no dev file, evaluating": (remove("data/dev.tsv"), EVAL, "dev.tsv: not found"),
    "no augmented file": (
        nothing,
        {"aug_train": True},
        "train_aug.tsv: not found; leave out --aug_train (with the scripts: AUG_TRAIN=0)",
    ),
    "empty train file": (empty("data/train.tsv"), {}, "train.tsv: holds no examples"),
    "empty dev file": (empty("data/dev.tsv"), PREDICTION, "dev.tsv: holds no examples"),
    "train file of a header alone": (rows("data/train.tsv"), {}, "train.tsv: holds no examples"),
    "no teacher": (remove("teacher"), {}, "teacher: no such folder; expected a model's folder with config.json"),
    "no student": (remove("student"), {}, "student: no such folder; expected a model's folder with config.json"),
    "no student, evaluating": (remove("student"), EVAL, "student: no such folder"),
    "empty teacher": (empty("teacher"), {}, "teacher/config.json: not found"),
    "empty student": (empty("student"), PREDICTION, "student/config.json: not found"),
    "teacher without config.json": (remove("teacher/config.json"), {}, "teacher/config.json: not found"),
    "student without vocabulary": (remove("student/vocab.txt"), {}, "student/vocab.txt"),
    "teacher without weights": (remove("teacher/pytorch_model.bin"), {}, "teacher: has no weights; expected"),
    "empty weights": (empty("student/pytorch_model.bin"), {}, "student/pytorch_model.bin: cannot be read"),
    "empty vocabulary": (empty("teacher/vocab.txt"), {}, "teacher/vocab.txt is empty"),
    "weights of text": (
        write("student/pytorch_model.bin", b"not weights\nat all\n"),
        {},
        "cannot be read as a dictionary of tensors",
    ),
    "config of text": (write("teacher/config.json", b"{not json"), FINETUNE, "teacher/config.json: is not valid JSON"),
}

MODELS = {
    "weights of another shape": (
        weights("student", lambda w: w.update({"bert.pooler.dense.weight": torch.zeros(31, 32)})),
        {},
        "student: bert.pooler.dense.weight has the shape [31, 32], expected [32, 32]",
    ),
    "teacher's weights of another shape": (
        config("teacher", intermediate_size=95),
        PREDICTION,
        "has the shape [96, 48], expected [95, 48]",
    ),
    "an encoder with a layer too few": (
        config("student", num_hidden_layers=6),
        {},
        "student: the weights lack bert.encoder.layer.3.",
    ),
    "depth no multiple": (
        student_of(num_hidden_layers=4),
        {},
        "the teacher has 6 layers and the student 4",
    ),
    "student deeper than its teacher": (
        student_of(num_hidden_layers=12),
        {},
        "the teacher has 6 layers and the student 12",
    ),
    "another number of heads": (
        config("student", num_attention_heads=8),
        {},
        "the teacher has 4 attention heads and the student 8",
    ),
    "vocabularies of another size": (
        lambda place: (place.student / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", encoding="utf-8"),
        {},
        "teacher and student have different vocabularies (100 and 4 tokens)",
    ),
    "vocabularies of the same size": (
        swapped_words,
        PREDICTION,
        "teacher and student have different vocabularies (first at line 11, where the teacher has 'was')",
    ),
    "more words than embeddings": (
        config("teacher", vocab_size=99),
        {},
        "teacher: the vocabulary has 100 tokens, config.json says vocab_size 99",
    ),
    "a raw BERT as a teacher": (
        weights("teacher", without_heads),
        {},
        "teacher: the teacher has no classifier, it is a raw BERT; fine-tune it on the task first (--do_finetune",
    ),
    "a bare encoder as a teacher": (
        weights("teacher", bare),
        PREDICTION,
        "it is a raw BERT; fine-tune it on the task first",
    ),
    "a classifier of tokens as a teacher": (
        config("teacher", architectures=["BertForTokenClassification"]),
        {},
        "teacher: the teacher is a BertForTokenClassification",
    ),
    "a classifier of choices evaluated": (
        config("student", architectures=["BertForMultipleChoice"]),
        EVAL,
        "student: the model is a BertForMultipleChoice",
    ),
    "a teacher of TensorFlow": (
        lambda place: [
            (place.teacher / name).rename(place.teacher / new)
            for name, new in (("config.json", "bert_config.json"), ("pytorch_model.bin", "bert_model.ckpt.index"))
        ],
        {},
        "bert_model.ckpt.index is a TensorFlow checkpoint",
    ),
    "a raw BERT evaluated": (weights("student", without_heads), EVAL, "student: the model has no classifier"),
    "a head of another name": (
        weights("teacher", lambda w: [w.update({k.replace("classifier", "out"): w.pop(k)}) for k in list(w)]),
        {},
        "keys that are not used (out.weight, out.bias",
    ),
    "a teacher of several labels per text": (
        config("teacher", problem_type="multi_label_classification"),
        {},
        "problem_type 'multi_label_classification', SST-2 needs 'single_label_classification'",
    ),
    "a score's model evaluated": (config("student", problem_type="regression"), EVAL, "problem_type 'regression'"),
    "a teacher without a pooler": (
        weights("teacher", without_pooler),
        {},
        "teacher: the weights lack bert.pooler.dense.weight, bert.pooler.dense.bias, which the teacher needs",
    ),
    "a teacher of another number of labels": (
        weights("teacher", lambda w: w.update(weights_of(linear("classifier", 48, 3)))),
        {"transfer_learning": True},
        "teacher: the classifier of the teacher has 3 outputs, SST-2 has 2 labels",
    ),
    "a student of another number of labels": (
        weights("student", lambda w: w.update(weights_of(linear("classifier", 32, 3)))),
        {},
        "student: the classifier has 3 outputs, SST-2 has 2 labels; --transfer_learning",
    ),
    "more tokens than positions": (nothing, {"max_seq_length": 65}, "has only 64 positions"),
}

DATA = {
    "a row with too few columns": (
        rows("data/train.tsv", ["a film", "1"], ["a film"]),
        {},
        "data/train.tsv, row 3: has 1 column, SST-2 needs at least 2",
    ),
    "an unknown label": (
        rows("data/dev.tsv", ["a film", "1"], ["a film", "positive"]),
        PREDICTION,
        "data/dev.tsv, row 3: the label is 'positive', expected one of 0, 1",
    ),
    "an unknown label, evaluating": (rows("data/dev.tsv", ["a film", "-"]), EVAL, "dev.tsv, row 2: the label is '-'"),
    "a file of another encoding": (
        write("data/train.tsv", "sentence\tlabel\na film\t1\n".encode("utf-16")),
        {},
        "data/train.tsv: is UTF-16",
    ),
    "a file split by commas": (write("data/train.tsv", b"sentence,label\na film,1\n"), {}, "row 2: has 1 column"),
}


@pytest.mark.parametrize(
    ("change", "flags", "message"), (FOLDERS | MODELS | DATA).values(), ids=FOLDERS | MODELS | DATA
)
def test_a_mistake_is_one_line(sst2, change, flags, message):
    """Traps 23, 28, 30 and 33 among others."""
    change(sst2)
    assert message in sst2.fails(**flags)


@pytest.mark.parametrize("stage", [{}, PREDICTION, FINETUNE], ids=["intermediate", "prediction", "fine-tuning"])
def test_an_output_folder_that_is_not_empty_is_refused_and_unchanged(sst2, stage):
    """Trap 25: the message names the flag and the scripts' variable that replace the model in it."""
    sst2.model.mkdir()
    (sst2.model / "precious").write_text("precious", encoding="utf-8")
    line = sst2.fails(**stage)
    assert "model: --output_dir is not empty" in line
    assert "--overwrite_output_dir" in line
    assert "OVERWRITE_OUTPUT_DIR=1" in line
    assert (sst2.model / "precious").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("source", ["teacher", "student", "data"])
def test_an_output_folder_that_the_run_reads_from_is_refused(sst2, source):
    line = sst2.fails(output_dir=sst2.folder / source, overwrite_output_dir=True)
    assert f"{source}: --output_dir is a folder that this run reads from" in line


@pytest.mark.parametrize("flag", ["output_dir", "fps_acc_dir"])
@pytest.mark.parametrize("below", ["", "below"])
@pytest.mark.parametrize("stage", [{}, EVAL], ids=["training", "evaluating"])
def test_a_file_where_a_folder_is_needed_is_an_error(sst2, flag, below, stage):
    (sst2.folder / "file").write_text("", encoding="utf-8")
    line = sst2.fails(**stage, **{flag: sst2.folder / "file" / below})
    assert f"--{flag}" in line
    assert "file" in line


@pytest.mark.parametrize("name", ["metrics.jsonl", "train_full_1p_1.txt", "debug_layer_loss.log"])
def test_a_log_that_cannot_be_written_is_an_error(sst2, name):
    """A folder has the name of the log."""
    (sst2.output / name).mkdir(parents=True)
    assert name in sst2.fails()


@pytest.mark.parametrize("flag", ["data_dir", "teacher_model", "output_dir"])
def test_a_name_that_is_too_long_for_a_file_is_an_error(sst2, flag):
    assert "a" * 300 in sst2.fails(**{flag: "a" * 300})


def test_code_in_a_checkpoint_is_refused_and_not_run(sst2):
    """Trap 24."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(sst2.folder / "attacked"),)

    torch.save({"classifier.weight": Attack()}, sst2.teacher / "pytorch_model.bin")
    line = sst2.fails()
    assert "teacher/pytorch_model.bin: cannot be read as a dictionary of tensors" in line
    assert "a file that holds other objects is refused, since loading it could run code" in line


def test_an_unknown_label_and_a_model_with_one_segment_are_refused_for_pairs(mnli):
    write_rows(mnli.data / "dev_mismatched.tsv", [["h"] * 12, ["x"] * 11 + ["neutral"], ["x"] * 11 + ["maybe"]])
    assert (
        "dev_mismatched.tsv, row 3: the label is 'maybe', expected one of contradiction, entailment, neutral"
        in mnli.fails()
    )
    edit_config(mnli.student, type_vocab_size=1)
    edit_weights(mnli.student, lambda w: w.update({"bert.embeddings.token_type_embeddings.weight": torch.zeros(1, 36)}))
    assert "student: the model has 1 segment, MNLI has two texts" in mnli.fails()


def test_too_many_steps_are_an_error(sst2):
    assert "--num_train_epochs" in sst2.fails(num_train_epochs="1e308", train_batch_size=1)


def test_a_model_that_is_too_large_for_memory_is_an_error(sst2):
    edit_config(sst2.student, intermediate_size=10**13)
    assert "student" in sst2.fails()


@pytest.mark.parametrize("key", ["classifier.weight", "fit_dense.weight"])
@pytest.mark.parametrize("kind", ["scalar", "sparse", "complex"])
def test_a_scalar_sparse_or_complex_tensor_is_an_error(sst2, key, kind):
    kinds = {"scalar": torch.Tensor.sum, "sparse": torch.Tensor.to_sparse, "complex": lambda t: t.to(torch.complex64)}
    edit_weights(sst2.student, lambda weights: weights.update({key: kinds[kind](weights[key])}))
    assert key in sst2.fails()


def test_a_refused_checkpoint_gives_no_warning(sst2, recwarn):
    """A warning would be two more lines on standard error."""
    (sst2.teacher / "pytorch_model.bin").write_bytes(pickle.dumps({"classifier.weight": object}, protocol=4))
    assert "cannot be read as a dictionary of tensors" in sst2.fails()
    assert [str(warning.message) for warning in recwarn] == []


def test_unusual_texts_can_be_trained_on(sst2):
    """Empty texts, very long ones, quotation marks, control characters, bytes that are not UTF-8."""
    texts = [
        b"",
        b" ",
        b'"',
        b'"""open',
        b"caf\xe9 \xff\xfe",
        b"\x00\x01",
        b"film " * 50_000,
        b"x" * 100_000,
        "\u200b\u3000".encode(),
    ]
    content = b"sentence\tlabel\n" + b"".join(text + b"\t%d\n" % (n % 2) for n, text in enumerate(texts)) + b"\n\n"
    for name in ("train.tsv", "dev.tsv"):
        (sst2.data / name).write_bytes(content)
    for stage in ({}, PREDICTION):
        for padding in ("longest", "max_length"):
            name = sst2.folder / f"model_{len(stage)}_{padding}"
            done = sst2.run(**stage, padding=padding, train_batch_size=2, output_dir=name, cache_limit=0)
            assert ": 9 examples of " in done.out
            assert "train.tsv: 1 rows are not UTF-8" in done.out


def test_the_command_ends_with_status_2_and_one_line(sst2):
    """In a process of its own: no warning and no traceback."""
    done = command(str(ROOT / "main.py"), *sst2.flags(student_model=sst2.folder / "nowhere"), cwd=sst2.folder)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith(f"main.py: error: {sst2.folder / 'nowhere'}: ")
    assert done.err.count("\n") == 1


def test_an_error_in_the_code_keeps_its_traceback(sst2, monkeypatch):
    """Only a UserError is printed as one line."""
    monkeypatch.setattr("distillation.runs.train.load_features", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(main.main, sst2.flags())
    assert not Path(sst2.model).exists()
