"""A new student: random, or from the teacher's mapped layers; and main.py teaches it."""

import json

import pytest
import torch
from cases import Golden, Workplace, call, command, edit_config, edit_weights, linear, read_bin, weights_of

from distillation import new_student


def make(place: Workplace, **changes):
    """Runs the command for the golden teacher: 6 layers, hidden 48, 4 heads, intermediate 96."""
    values = {
        "teacher": place.teacher,
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "init": "teacher_layers",
        "output_dir": place.folder / "new",
        **changes,
    }
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    return call(new_student.main, [flag for flag in flags if flag != "True"], "distillation.new_student")


def refused(place: Workplace, **changes) -> str:
    before = sorted(place.folder.rglob("*"))
    done = make(place, **changes)
    assert done.status == 2
    assert sorted(place.folder.rglob("*")) == before, "something was written"
    assert done.err.startswith("distillation.new_student: error: ")
    assert done.err.count("\n") == 1
    return done.err


def test_layers_are_copied_by_the_uniform_map(sst2):
    """Student layer m is teacher layer 2m; embeddings, pooler and classifier come as they are."""
    done = make(sst2)
    assert done.status == 0, done.err
    teacher, student = read_bin(sst2.teacher), read_bin(sst2.folder / "new")
    for key, tensor in student.items():
        source = key
        for ours in range(3):
            if key.startswith(f"bert.encoder.layer.{ours}."):
                source = key.replace(f"layer.{ours}.", f"layer.{2 * ours + 1}.")
        if not key.startswith("fit_dense."):
            assert torch.equal(tensor, teacher[source]), key
    assert torch.equal(student["fit_dense.weight"], torch.eye(48))
    assert not student["fit_dense.bias"].any()
    copied = "bert.embeddings, " + ", ".join(
        f"bert.encoder.layer.{2 * n + 1} as bert.encoder.layer.{n}" for n in range(3)
    )
    assert f"copied from the teacher: {copied}, bert.pooler, classifier" in done.out.splitlines()
    assert "new: 3 layers, hidden 48, intermediate 96, 0.1 million parameters" in done.out


def test_the_folder_is_whole_and_takes_over_the_teachers_form(sst2):
    edit_config(
        sst2.teacher,
        architectures=["BertForSequenceClassification"],
        id2label={"0": "bad", "1": "good"},
        layer_norm_eps=1e-7,
    )
    make(sst2)
    folder = sst2.folder / "new"
    names = sorted(path.name for path in folder.iterdir())
    model = ["config.json", "model_manifest.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt"]
    assert names == sorted([*model, "run.json"])
    assert (folder / "vocab.txt").read_bytes() == (sst2.teacher / "vocab.txt").read_bytes()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "layer_norm_eps": 1e-7,
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "bad", "1": "good"},
    }
    assert expected.items() <= config.items()


@pytest.mark.parametrize(
    ("sizes", "copied"),
    [
        ({"intermediate_size": 64}, "bert.embeddings, bert.pooler, classifier"),
        ({"hidden_size": 32}, "nothing, no shape is the same"),
    ],
)
def test_a_module_is_copied_only_as_a_whole_where_its_shapes_allow(sst2, sizes, copied):
    done = make(sst2, **sizes)
    assert done.status == 0, done.err
    assert f"copied from the teacher: {copied}" in done.out.splitlines()
    teacher, student = read_bin(sst2.teacher), read_bin(sst2.folder / "new")
    for key, tensor in student.items():
        same = key in teacher and teacher[key].shape == tensor.shape and torch.equal(tensor, teacher[key])
        assert same == any(key.startswith(f"{name}.") for name in copied.split(", ")), key
    assert student["fit_dense.weight"].shape == (48, sizes.get("hidden_size", 48))


def test_a_random_student_copies_nothing_and_repeats_with_its_seed(sst2):
    saved = []
    for number, seed in enumerate((1, 1, 2)):
        done = make(
            sst2, init="random", num_hidden_layers=4, hidden_size=16, seed=seed, output_dir=sst2.folder / f"new{number}"
        )
        assert done.status == 0, done.err
        assert "copied" not in done.out
        saved.append(read_bin(sst2.folder / f"new{number}"))
    assert all(torch.equal(tensor, saved[1][key]) for key, tensor in saved[0].items())
    assert not torch.equal(saved[0]["classifier.weight"], saved[2]["classifier.weight"])
    assert saved[0]["bert.encoder.layer.3.output.dense.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_a_teacher_of_three_labels_gets_a_student_of_three(mnli):
    done = make(mnli, num_hidden_layers=2, hidden_size=60, intermediate_size=80)
    assert done.status == 0, done.err
    teacher, student = read_bin(mnli.teacher), read_bin(mnli.folder / "new")
    assert torch.equal(student["classifier.weight"], teacher["classifier.weight"])


def test_bare_and_old_names_are_understood(sst2):
    """An encoder as it is published, with gamma and beta and no prefix; it has no classifier to copy."""
    expected = read_bin(sst2.teacher)

    def older(weights):
        for key in list(weights):
            tensor = weights.pop(key)
            if key.startswith("bert."):
                key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                weights[key.removeprefix("bert.")] = tensor

    edit_weights(sst2.teacher, older)
    done = make(sst2)
    assert "bert.pooler" in done.out
    assert "classifier" not in done.out
    student = read_bin(sst2.folder / "new")
    for name in ("attention.output.LayerNorm.weight", "intermediate.dense.weight"):
        assert torch.equal(student[f"bert.encoder.layer.2.{name}"], expected[f"bert.encoder.layer.5.{name}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "the teacher has 6 layers and the student 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number above 0"),
        ({"hidden_size": 50}, "hidden_size 50 is no multiple of num_attention_heads 4"),
        ({"intermediate_size": -1}, "intermediate_size is -1, expected a whole number above 0"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"seed": 2**70}, f"--seed {2**70}: expected a number below 2**32"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number above 0"),
        ({"num_attention_heads": 5}, "hidden_size 48 is no multiple of num_attention_heads 5"),
        ({"init": "layers"}, "--init: invalid choice: 'layers'"),
        ({"teacher": "nowhere"}, "nowhere: no such folder; --teacher is a model's folder"),
        ({"teacher": None}, "the following arguments are required: --teacher"),
    ],
)
def test_what_cannot_be_made_is_one_line(sst2, changes, message):
    assert message in refused(sst2, **changes)


def test_it_refuses_to_overwrite(sst2):
    assert make(sst2).status == 0
    assert "new: --output_dir is not empty" in refused(sst2)
    assert "teacher: --output_dir is a folder that this run reads from" in refused(sst2, output_dir=sst2.teacher)
    flags = ["--overwrite_output_dir", "--init", "random", "--teacher", str(sst2.teacher), "--hidden_size", "16"]
    flags += ["--output_dir", str(sst2.folder / "new")]
    assert call(new_student.main, flags).status == 0
    assert json.loads((sst2.folder / "new" / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 16


def test_the_defaults_are_tinybert4(sst2):
    edit_config(sst2.teacher, num_attention_heads=12)
    done = call(new_student.main, ["--teacher", str(sst2.teacher), "--output_dir", str(sst2.folder / "new")])
    assert done.status == 0, done.err
    config = json.loads((sst2.folder / "new" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (4, 312, 1200)


@pytest.mark.parametrize("init", ["random", "teacher_layers"])
def test_main_teaches_it(sst2, init):
    """As deep as its teacher and all copied, a student has nothing left to learn."""
    make(sst2, init=init, num_hidden_layers=6)
    sst2.student = sst2.folder / "new"
    words = sst2.run(num_train_epochs=2).out
    assert "begun anew" not in words
    assert "not used" not in words
    first = sst2.series("att_loss")[0] + sst2.series("rep_loss")[0]
    assert first == pytest.approx(0, abs=1e-9) if init == "teacher_layers" else first > 0.1


def test_a_student_of_a_raw_encoder_is_accepted_for_any_task(mnli):
    """Such a teacher has no classifier yet; the student is made before, or while, that is mended."""
    edit_weights(mnli.teacher, lambda w: [w.pop(key) for key in list(w) if key.startswith(("classifier", "fit_dense"))])
    assert make(mnli, num_hidden_layers=2, hidden_size=60, intermediate_size=80).status == 0
    edit_weights(mnli.teacher, lambda w: w.update(weights_of(linear("classifier", 60, 3))))
    mnli.student = mnli.folder / "new"
    mnli.run()


def test_it_is_a_command(tmp_path):
    place = Golden("sst2_small").workplace(tmp_path)
    flags = ["--teacher", "teacher", "--hidden_size", "16", "--output_dir", "new"]
    done = command("-m", "distillation.new_student", *flags, cwd=place.folder)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("new: 4 layers, hidden 16, intermediate 1200, ")
