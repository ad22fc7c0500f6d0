"""Weight files: every known form is read and written, and what does not fit the model is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from cases import (
    assert_close,
    assert_same_weights,
    edit_weights,
    encoder_shapes,
    linear,
    read_bin,
    weights_of,
    write_model,
)
from safetensors.torch import save_file
from small_models import CONFIG, VOCAB

from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights, write_weights
from transformer.heads import BertForMaskedLM, BertForPreTraining, TinyBertForSequenceClassification
from transformer.loading import load_weights

SHAPES = encoder_shapes(CONFIG) | linear("classifier", 8, 3)
FIT_SIZE = 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete classifier in the original's form."""
    return write_model(tmp_path / "model", CONFIG, weights_of(SHAPES | linear("fit_dense", 8, FIT_SIZE)), VOCAB)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return TinyBertForSequenceClassification.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        lambda key: key.removeprefix("bert."),
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"model.{key.removeprefix('bert.')}",
        lambda key: f"bert.module.{key.removeprefix('bert.')}" if key.startswith("bert.") else key,
    ],
    ids=["gamma and beta", "bare encoder", "DDP", "DDP and torch.compile", "Lightning, bare encoder", "DDP encoder"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_old_key_names_and_files_are_read(folder, rename, zipped):
    """The first releases were written before torch used zip archives. `position_ids` are constants."""
    expected = read_bin(folder)
    weights = expected | {"bert.embeddings.position_ids": torch.arange(10)[None]}
    renamed = {rename(key): tensor for key, tensor in weights.items()}
    torch.save(renamed, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_weights(load(folder), expected)
    assert not [key for key in read_weights(folder) if key.endswith("position_ids")]


def test_a_module_prefix_of_some_keys_only_is_kept(folder):
    torch.save({"module.classifier.weight": torch.ones(1), "other": torch.ones(1)}, folder / "pytorch_model.bin")
    assert set(read_weights(folder)) == {"module.classifier.weight", "other"}


def test_projections_of_each_layer_are_read_and_written(folder, tmp_path):
    """Trap 32: the second release's checkpoints, `fit_denses.0` to `fit_denses.2` for two layers."""
    shapes = SHAPES | {k: s for n in range(3) for k, s in linear(f"fit_denses.{n}", 8, FIT_SIZE).items()}
    expected = weights_of(shapes)
    torch.save(expected, folder / "pytorch_model.bin")
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    assert_same_weights(model.state_dict(), expected)
    model.save_pretrained(tmp_path / "copy")
    assert_same_weights(read_bin(tmp_path / "copy"), expected)
    assert BertConfig.from_pretrained(tmp_path / "copy").to_dict() == model.config.to_dict()


def test_safetensors_have_priority_until_weights_are_saved(folder):
    """Trap 24: the pickle beside them is not opened."""
    expected = {key: tensor + 1 for key, tensor in read_bin(folder).items()}
    save_file(expected, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert_same_weights(load(folder), expected)
    new = {key: tensor * 2 for key, tensor in expected.items()}
    write_weights(folder, new)
    assert_same_weights(read_weights(folder), new)


@pytest.mark.parametrize(
    ("kind", "ours", "hidden_act"),
    [
        ("BertForSequenceClassification", TinyBertForSequenceClassification, "gelu"),
        ("BertForPreTraining", BertForPreTraining, "gelu"),
        *(("BertForMaskedLM", BertForMaskedLM, name) for name in ("gelu", "gelu_new", "relu", "silu", "tanh")),
    ],
)
def test_a_model_saved_by_transformers_gives_the_same_logits(tmp_path, kind, ours, hidden_act):
    """Trap 31: its classifier has no relu, as its config's architecture tells."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIG, num_labels=3, initializer_range=0.3, hidden_act=hidden_act)
    theirs = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # new biases are 0
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    model = ours.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[2, 5, 6, 7, 3, 8, 3], [2, 6, 3, 3, 0, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=segments, attention_mask=(ids > 0).long()).to_tuple()
        out = model(ids, segments, (ids > 0).long())
    logits = [out] if kind == "BertForMaskedLM" else list(out)[: len(expected)]
    for one, other in zip(logits, expected, strict=True):
        assert_close(one, other, atol=1e-5)


@pytest.mark.parametrize("kept", ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"])
def test_a_tied_weight_is_needed_only_once(folder, kept):
    """The decoder's weights are the word embeddings; files hold both, or either."""
    shapes = encoder_shapes(CONFIG) | linear("cls.predictions.transform.dense", 8, 8)
    shapes |= {"cls.predictions.bias": (9,)}
    shapes |= {f"cls.predictions.transform.LayerNorm.{name}": (8,) for name in ("weight", "bias")}
    weights = weights_of(shapes)
    embeddings = weights.pop("bert.embeddings.word_embeddings.weight")
    torch.save({kept: embeddings, **weights}, folder / "pytorch_model.bin")
    model = BertForMaskedLM(BertConfig.from_pretrained(folder))
    assert model.load(read_weights(folder), folder).missing == ()
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, embeddings)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_missing_and_unexpected_keys_are_reported(folder):
    """Trap 23."""
    weights = read_weights(folder)
    for key in ("classifier.weight", "classifier.bias", "bert.pooler.dense.bias"):
        del weights[key]
    weights["cls.predictions.bias"] = torch.zeros(9)
    model = TinyBertForSequenceClassification(BertConfig.from_pretrained(folder), 3, FIT_SIZE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_weights(model, weights, folder)
    assert set(report.missing) == {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"}
    assert report.unexpected == ("cls.predictions.bias",)
    assert report.lacks("classifier.")
    assert not report.lacks("fit_dense.")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights.get(key, before[key])), key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: [w.pop(key) for key in list(w) if ".layer.1." in key], r"lack bert\.encoder\.layer\.1\..* and 13"),
        (lambda w: w.update({"bert.pooler.dense.bias": torch.zeros(9)}), r"dense\.bias has the shape \[9\].* \[8\]"),
    ],
    ids=["a layer is missing", "another shape"],
)
def test_weights_that_do_not_fit_the_encoder_are_refused(folder, change, named):
    """Trap 23."""
    edit_weights(folder, change)
    with pytest.raises(UserError, match=rf"model: .*{named}"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ""),
        ([torch.zeros(1)], ""),
        ({"a": 1}, ""),
        ({"model": {"a": torch.zeros(1)}}, "'model'; save the inner dictionary, 'model'"),
        ({"epoch": 3, "state_dict": {"a": torch.zeros(1)}, "optimizer": {}}, "save the inner dictionary, 'state_dict'"),
    ],
)
def test_a_file_without_a_dictionary_of_tensors_is_refused(folder, content, named):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: .*dictionary of tensors.*{named}"):
        read_weights(folder)


def test_other_keys_beside_a_wrapped_model_stay_and_its_prefix_is_logged(folder, caplog):
    caplog.set_level("INFO")
    weights = {f"model.{key}": tensor for key, tensor in read_bin(folder).items()}
    torch.save(weights | {"train_acc.correct": torch.tensor(3)}, folder / "pytorch_model.bin")
    assert {"classifier.weight", "train_acc.correct"} <= set(read_weights(folder))
    assert "prefix model." in caplog.text


def test_a_file_of_two_models_is_refused_with_both_prefixes(folder):
    weights = read_bin(folder)
    both = {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in weights.items()}
    torch.save(both, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"several models, student\., teacher\."):
        read_weights(folder)


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("key", ["bert.encoder.layer.1.output.dense.weight", "classifier.bias"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: (t * 100).to(torch.int8), "int8"),
        (lambda t: torch.full_like(t, 7, dtype=torch.uint8), "uint8"),
        (lambda t: t.fill_(float("nan")), "not finite"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), "not finite"),
        (lambda t: torch.full_like(t, 1e39, dtype=torch.float64), "not finite"),
    ],
    ids=["int8", "uint8", "nan", "one inf", "too large for fp32"],
)
def test_weights_that_are_not_floating_point_and_finite_are_refused(folder, kind, key, change, named):
    weights = read_bin(folder)
    weights[key] = change(weights[key])
    (save_file if kind == "model.safetensors" else torch.save)(weights, folder / kind)
    with pytest.raises(UserError, match=rf"{kind}: {key} .*{named}"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (None, "distillation.new_student"),
        ("model.safetensors.index.json", "save_pretrained"),
        ("pytorch_model.bin.index.json", "save_pretrained"),
        ("bert_model.ckpt.data-00000-of-00001", "from_tf=True"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
    ],
)
def test_a_folder_without_weights_is_refused_and_other_forms_are_named(folder, name, advice):
    (folder / "pytorch_model.bin").unlink()
    if name is not None:
        (folder / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="model: has no weights") as caught:
        read_weights(folder)
    assert (name or "") in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(folder, name):
    (folder / name).write_bytes(b"version https:" + b"//git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n")
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        read_weights(folder)


def test_the_labels_and_the_form_of_the_head_are_saved(folder, tmp_path):
    """Trap 31: every later reader of the student needs both."""
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    for relu_head, kind in ((True, "TinyBertForSequenceClassification"), (False, "BertForSequenceClassification")):
        model.set_labels(("x", "y", "z"), relu_head)
        model.save_pretrained(tmp_path / "copy")
        written = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
        assert written["architectures"] == [kind]
        assert written["id2label"] == {"0": "x", "1": "y", "2": "z"}
        assert written["label2id"] == {"x": 0, "y": 1, "z": 2}
        assert TinyBertForSequenceClassification.from_pretrained(tmp_path / "copy").config.relu_head is relu_head
