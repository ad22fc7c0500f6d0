"""distillation.new_student makes a random student, or one with the teacher's mapped layers, that main.py trains."""

import json

import pytest
import torch
from cases import Run, Workplace, call, command, edit_config, edit_weights, linear, read_bin, weights_of

from distillation import new_student


def make(place: Workplace, **changes: object) -> Run:
    """Run the command for the golden teacher: 6 layers, hidden 48, 4 heads, intermediate 96."""
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


def make_new(place: Workplace, **changes: object) -> Run:
    done = make(place, **changes)
    assert done.status == 0, done.err
    return done


def new_config(place: Workplace) -> dict:
    return json.loads((place.folder / "new" / "config.json").read_text(encoding="utf-8"))


def refused(place: Workplace, **changes) -> str:
    before = sorted(place.folder.rglob("*"))
    done = make(place, **changes)
    assert done.status == 2
    assert sorted(place.folder.rglob("*")) == before, "something was written"
    assert done.err.startswith("distillation.new_student: error: ")
    assert done.err.count("\n") == 1
    return done.err


def test_student_layer_m_is_teacher_layer_2m(sst2):
    """Embeddings, pooler and classifier are copied too; the projection starts as the identity."""
    words = make_new(sst2).out
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
    for name in ("bert.embeddings", "bert.encoder.layer.3 as bert.encoder.layer.1", "bert.pooler", "classifier"):
        assert name in words
    assert "3 layers, hidden 48, intermediate 96, 0.1 million parameters" in words


@pytest.mark.parametrize(("layer_map", "layers"), [("1,4,5", (1, 4, 5)), ("top", (4, 5, 6))])
def test_the_layer_map_chooses_the_copied_layers(sst2, layer_map, layers):
    make_new(sst2, layer_map=layer_map)
    teacher, student = read_bin(sst2.teacher), read_bin(sst2.folder / "new")
    key = "bert.encoder.layer.{}.output.dense.weight"
    for ours, theirs in enumerate(layers):
        assert torch.equal(student[key.format(ours)], teacher[key.format(theirs - 1)])


def test_the_folder_is_complete_and_has_the_teachers_settings(sst2):
    settings = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "bad", "1": "good"},
        "layer_norm_eps": 1e-7,
    }
    edit_config(sst2.teacher, **settings)
    make_new(sst2)
    folder = sst2.folder / "new"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt", "run.json"} <= names
    assert (folder / "vocab.txt").read_bytes() == (sst2.teacher / "vocab.txt").read_bytes()
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    assert (settings | sizes | {"vocab_size": 100}).items() <= new_config(sst2).items()


@pytest.mark.parametrize(
    ("sizes", "copied"),
    [
        ({"intermediate_size": 64}, ("bert.embeddings.", "bert.pooler.", "classifier.")),
    ],
)
def test_a_module_is_copied_only_if_all_its_shapes_are_equal(sst2, sizes, copied):
    assert "copied from the teacher: " in make_new(sst2, **sizes).out
    teacher, student = read_bin(sst2.teacher), read_bin(sst2.folder / "new")
    for key, tensor in student.items():
        same = key in teacher and teacher[key].shape == tensor.shape and torch.equal(tensor, teacher[key])
        assert same == key.startswith(copied), key
    assert student["fit_dense.weight"].shape == (48, sizes.get("hidden_size", 48))


def test_a_random_student_copies_nothing_and_depends_on_its_seed(sst2):
    saved = []
    for number, seed in enumerate((1, 1, 2)):
        folder = sst2.folder / f"new{number}"
        sizes = {"num_hidden_layers": 4, "hidden_size": 16}
        assert "copied" not in make_new(sst2, init="random", seed=seed, output_dir=folder, **sizes).out
        saved.append(read_bin(folder))
    assert all(torch.equal(tensor, saved[1][key]) for key, tensor in saved[0].items())
    assert not torch.equal(saved[0]["classifier.weight"], saved[2]["classifier.weight"])
    assert saved[0]["bert.encoder.layer.3.output.dense.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_a_published_encoder_without_prefix_and_with_gamma_and_beta_is_read(sst2):
    """It has no classifier to copy."""
    expected = read_bin(sst2.teacher)

    def older(weights):
        for key in list(weights):
            tensor = weights.pop(key)
            if key.startswith("bert."):
                key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                weights[key.removeprefix("bert.")] = tensor

    edit_weights(sst2.teacher, older)
    words = make_new(sst2).out
    assert "bert.pooler" in words
    assert "classifier" not in words
    student = read_bin(sst2.folder / "new")
    for name in ("attention.output.LayerNorm.weight", "intermediate.dense.weight"):
        assert torch.equal(student[f"bert.encoder.layer.2.{name}"], expected[f"bert.encoder.layer.5.{name}"])


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_hidden_layers": 4}, ["6 layers", "4", "--layer_map 2,3,5,6"]),
        ({"num_hidden_layers": 5}, ["6 layers", "5", "--layer_map 2,3,4,5,6"]),
        ({"layer_map": "1,2"}, ["--layer_map 1,2", "3"]),
        ({"layer_map": "1,2,7"}, ["--layer_map 1,2,7", "6 layers"]),
        ({"layer_map": "last"}, ["--layer_map last"]),
        ({"hidden_size": 32}, ["teacher_layers", "--hidden_size 48"]),
        ({"hidden_size": 32, "intermediate_size": 64}, ["teacher_layers", "--intermediate_size 96"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"hidden_size": 50}, ["hidden_size is 50", "num_attention_heads 4"]),
        ({"intermediate_size": -1}, ["intermediate_size is -1"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"seed": 2**70}, [f"--seed {2**70}"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"num_attention_heads": 5}, ["hidden_size is 48", "num_attention_heads 5"]),
        ({"init": "layers"}, ["--init", "'layers'"]),
        ({"teacher": "nowhere"}, ["nowhere", "--teacher"]),
        ({"teacher": None}, ["--teacher"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(sst2, changes, facts):
    line = refused(sst2, **changes)
    assert all(fact in line for fact in facts), line


def test_a_folder_is_overwritten_only_with_the_flag(sst2):
    make_new(sst2)
    assert f"{sst2.folder / 'new'}: --output_dir" in refused(sst2)
    assert f"{sst2.teacher}: --output_dir" in refused(sst2, output_dir=sst2.teacher, overwrite_output_dir=True)
    make_new(sst2, overwrite_output_dir=True, init="random", hidden_size=16)
    assert new_config(sst2)["hidden_size"] == 16


@pytest.mark.parametrize("init", ["random", "teacher_layers"])
def test_main_trains_the_new_student(sst2, init):
    """With all of its teacher's layers, its losses start at 0."""
    make_new(sst2, init=init, num_hidden_layers=6)
    sst2.student = sst2.folder / "new"
    words = sst2.run(num_train_epochs=2).out
    assert "newly initialized" not in words
    assert "not used" not in words
    first = sst2.series("att_loss")[0] + sst2.series("rep_loss")[0]
    assert first == pytest.approx(0, abs=1e-9) if init == "teacher_layers" else first > 0.1


def test_a_student_has_its_teachers_labels_or_those_of_the_task_it_is_trained_on(mnli):
    """A teacher without classifier gives a student for any task."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 60, "intermediate_size": 80}
    make_new(mnli, **sizes, output_dir=mnli.folder / "of three labels")
    teacher, student = read_bin(mnli.teacher), read_bin(mnli.folder / "of three labels")
    assert torch.equal(student["classifier.weight"], teacher["classifier.weight"])
    edit_weights(mnli.teacher, lambda w: [w.pop(key) for key in list(w) if key.startswith(("classifier", "fit_dense"))])
    make_new(mnli, **sizes)
    edit_weights(mnli.teacher, lambda w: w.update(weights_of(linear("classifier", 60, 3))))
    mnli.student = mnli.folder / "new"
    mnli.run()


def test_the_command_runs_as_a_module_and_makes_tinybert4_by_default(sst2):
    edit_config(sst2.teacher, num_attention_heads=12)
    done = command(*("-m", "distillation.new_student", "--teacher", "teacher", "--output_dir", "new"), cwd=sst2.folder)
    assert (done.status, done.err) == (0, "")
    assert "4 layers, hidden 312, intermediate 1200" in done.out
    sizes = {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200}
    assert sizes.items() <= new_config(sst2).items()
