"""A model's files: every known form is read, nothing in them is executed, and saving is whole or not at all."""

import json
import multiprocessing
import os
import pickle
import time
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

from distillation.checkpoints.outputs import save_model
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights, write_weights
from transformer.heads import BertForMaskedLM, BertForPreTraining, TinyBertForSequenceClassification
from transformer.loading import load_weights
from transformer.tokenization import BertTokenizer

CONFIG = {
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "!"]
SHAPES = encoder_shapes(CONFIG) | linear("classifier", 8, 3)
FIT_SIZE = 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole classifier in the original's form."""
    return write_model(tmp_path / "model", CONFIG, weights_of(SHAPES | linear("fit_dense", 8, FIT_SIZE)), VOCAB)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return TinyBertForSequenceClassification.from_pretrained(folder).state_dict()


def rename(folder: Path, *pairs: tuple[str, str]) -> None:
    """Changes part of every key."""
    weights = read_bin(folder)
    for old, new in pairs:
        weights = {key.replace(old, new): tensor for key, tensor in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize("prefix", [True, False], ids=["with bert.", "bare"])
@pytest.mark.parametrize("old_names", [True, False], ids=["gamma and beta", "weight and bias"])
def test_keys_of_every_age_are_read(folder, old_names, prefix):
    expected = read_bin(folder)
    if old_names:
        rename(folder, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    if not prefix:
        rename(folder, ("bert.", ""))
    edit_weights(folder, lambda w: w.update({f"{'bert.' * prefix}embeddings.position_ids": torch.arange(10)[None]}))
    assert_same_weights(load(folder), expected)


def test_keys_of_a_model_that_was_trained_in_several_processes_are_read(folder):
    expected = read_bin(folder)
    torch.save({f"module.{key}": tensor for key, tensor in expected.items()}, folder / "pytorch_model.bin")
    assert_same_weights(load(folder), expected)
    edit_weights(folder, lambda weights: weights.update({"other": torch.zeros(1)}))
    assert "module.classifier.weight" in read_weights(folder)  # not all keys have it: it is a part's name


def test_a_checkpoint_of_a_training_loop_is_told_with_its_keys(folder):
    torch.save({"epoch": 3, "state_dict": read_bin(folder), "optimizer": {"state": {}}}, folder / "pytorch_model.bin")
    told = r"tensors but 'epoch', 'state_dict', 'optimizer'; save the inner dictionary, 'state_dict', alone as pytorch_"
    with pytest.raises(UserError, match=told):
        read_weights(folder)


def test_a_legacy_file_is_read(folder):
    """The first releases were written before torch used zip archives."""
    expected = read_bin(folder)
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load(folder), expected)


def test_position_ids_are_neither_missing_nor_unexpected(folder):
    edit_weights(folder, lambda w: w.update({"bert.embeddings.position_ids": torch.arange(10)[None]}))
    assert "bert.embeddings.position_ids" not in read_weights(folder)


def test_projections_of_each_layer_are_read_and_written(folder, tmp_path):
    """Trap 32: the second release's checkpoints, `fit_denses.0` to `fit_denses.2` for two layers."""
    shapes = SHAPES | {k: s for n in range(3) for k, s in linear(f"fit_denses.{n}", 8, FIT_SIZE).items()}
    expected = weights_of(shapes)
    torch.save(expected, folder / "pytorch_model.bin")
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    assert_same_weights(model.state_dict(), expected)
    model.save_pretrained(tmp_path / "copy")
    assert_same_weights(read_bin(tmp_path / "copy"), expected)


def test_safetensors_go_first(folder):
    """Trap 24: the pickle beside it is not even opened."""
    expected = {key: tensor + 1 for key, tensor in read_bin(folder).items()}
    save_file(expected, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert_same_weights(load(folder), expected)


def test_saved_weights_are_the_ones_read_next(folder):
    """A model.safetensors of the model before would be read in their place."""
    save_file(read_bin(folder), folder / "model.safetensors")
    new = {key: tensor * 2 for key, tensor in read_bin(folder).items()}
    write_weights(folder, new)
    assert_same_weights(read_weights(folder), new)


def test_a_round_trip_loses_nothing(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"pre_trained": "", "training": "yes"}), encoding="utf-8")
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    assert_same_weights(read_bin(tmp_path / "copy"), read_bin(folder))
    assert BertConfig.from_pretrained(tmp_path / "copy").to_dict() == model.config.to_dict()
    written = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
    assert CONFIG.items() <= written.items()
    assert (written["pre_trained"], written["training"]) == ("", "yes")  # keys that mean nothing here
    assert written["model_type"] == "bert"


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("BertForSequenceClassification", TinyBertForSequenceClassification),
        ("BertForMaskedLM", BertForMaskedLM),
        ("BertForPreTraining", BertForPreTraining),
    ],
)
def test_a_folder_saved_by_transformers_is_read(tmp_path, kind, ours):
    """Trap 31: its classifier reads the pooled output itself, and the config it writes says so."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIG, num_labels=3, initializer_range=0.3)
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    model = ours.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[2, 5, 6, 7, 3, 8, 3], [2, 6, 3, 3, 0, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=segments, attention_mask=(ids > 0).long())[0]
        out = model(ids, segments, (ids > 0).long())
    assert_close(out if isinstance(out, torch.Tensor) else out[0], expected, atol=1e-5)


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


def test_what_is_missing_and_what_is_not_used_is_reported(folder):
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


def test_an_encoder_must_be_whole(folder):
    """Trap 23: a layer that is missing was to be used."""
    edit_weights(folder, lambda w: [w.pop(key) for key in list(w) if ".layer.1." in key])
    with pytest.raises(UserError, match=r"model: the weights lack bert\.encoder\.layer\.1\..* and 13 more; "):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    edit_weights(folder, lambda w: w.update({"bert.encoder.layer.0.intermediate.dense.bias": torch.zeros(11)}))
    message = r"bert\.encoder\.layer\.0\.intermediate\.dense\.bias has the shape \[11\], expected \[12\]"
    with pytest.raises(UserError, match=message):
        load(folder)


class Attack:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(folder, tmp_path, form):
    """Trap 24."""
    content = {"classifier.weight": Attack(tmp_path / "attacked")}
    path = folder / "pytorch_model.bin"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as a dictionary of tensors") as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()
    torch.load(path, weights_only=False) if form != "plain pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "attacked").is_dir(), "the attack itself does not work, so the test would show nothing"


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_gives_one_line(folder, form):
    name = "pytorch_model.bin"
    if form == "safetensors":
        name = "model.safetensors"
        save_file(read_bin(folder), folder / name)
    else:
        torch.save(read_bin(folder), folder / name, _use_new_zipfile_serialization=form == "zip")
    content = (folder / name).read_bytes()
    for length in (0, 1, 2, 7, 13, 60, 150, *range(200, len(content), len(content) // 20), len(content) - 1):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{name}: cannot be read") as caught:
            read_weights(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, 3, [torch.zeros(1)], {"a": 1}, {"model": {"a": torch.zeros(1)}}])
def test_a_file_of_something_else_is_refused(folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: holds no dictionary of tensors"):
        read_weights(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"model: has no weights; expected model\.safetensors or pytorch_model\.bin"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: not found; a model's folder holds config.json, weights and vocab.txt"),
        ("{", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps(CONFIG | {"hidden_size": 7}), "hidden_size 7 is no multiple of num_attention_heads 2"),
        (json.dumps(CONFIG | {"hidden_size": "8"}), "hidden_size is '8', expected a whole number above 0"),
        (json.dumps(CONFIG | {"num_hidden_layers": 0}), "num_hidden_layers is 0, expected a whole number above 0"),
        (json.dumps(CONFIG | {"vocab_size": True}), "vocab_size is True, expected a whole number above 0"),
        (json.dumps(CONFIG | {"hidden_act": "mish"}), "hidden_act is 'mish', expected one of gelu, "),
        (json.dumps(CONFIG | {"hidden_act": ["gelu"]}), "hidden_act is ['gelu'], expected one of gelu, "),
        (
            json.dumps(CONFIG | {"hidden_dropout_prob": 1}),
            "hidden_dropout_prob is 1, expected a number from 0 to below",
        ),
        (json.dumps(CONFIG | {"layer_norm_eps": 0}), "layer_norm_eps is 0, expected a number above 0"),
        (json.dumps(CONFIG | {"pad_token_id": 9}), "pad_token_id is 9, not an id of the vocabulary"),
        (json.dumps(CONFIG | {"model_type": "roberta"}), "model_type is 'roberta'; only 'bert' models can be used"),
        (json.dumps(CONFIG | {"position_embedding_type": "relative_key"}), "only 'absolute' is"),
        (json.dumps(CONFIG | {"id2label": ["a"]}), "id2label is no map of label numbers to names"),
        (json.dumps(CONFIG | {"architectures": "BertModel"}), "architectures is no list"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_name(folder, content, message):
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        BertConfig.from_pretrained(folder)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_and_the_heads_form_are_recorded(folder, tmp_path):
    """Trap 31: what reads the student later must know both."""
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    for relu_head, architecture in (
        (True, "TinyBertForSequenceClassification"),
        (False, "BertForSequenceClassification"),
    ):
        model.set_labels(("x", "y", "z"), relu_head)
        model.save_pretrained(tmp_path / "copy")
        written = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
        assert written["architectures"] == [architecture]
        assert written["id2label"] == {"0": "x", "1": "y", "2": "z"}
        assert written["label2id"] == {"x": 0, "y": 1, "z": 2}
        assert TinyBertForSequenceClassification.from_pretrained(tmp_path / "copy").config.relu_head is relu_head


def test_a_disk_that_fills_up_leaves_the_model_before_it_usable(folder, tmp_path, monkeypatch):
    """Trap 21: the small files still fit, the weights do not; the model that is overwritten was of another size."""
    old = read_bin(folder)
    changed = CONFIG | {"intermediate_size": 16}
    weights = weights_of(encoder_shapes(changed) | linear("classifier", 8, 3))

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match="the model cannot be saved"):
        save_model(folder, BertConfig.from_dict(changed), weights, BertTokenizer.from_pretrained(folder))
    assert_same_weights(load(folder), old)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_model_killed_while_it_is_saved_again_and_again_is_whole(folder):
    """Trap 21, with the real files and at moments nobody chose: every tensor is of one and the same saving."""
    config, tokenizer = BertConfig.from_pretrained(folder), BertTokenizer.from_pretrained(folder)
    weights = read_bin(folder)

    def save(number: int) -> None:
        save_model(folder, config, {key: torch.full_like(tensor, number) for key, tensor in weights.items()}, tokenizer)

    def save_forever() -> None:
        for number in range(1, 100_000):
            save(number)

    save(0)
    seen = set()
    for attempt in range(12):
        child = multiprocessing.get_context("fork").Process(target=save_forever)
        child.start()
        time.sleep(0.03 + 0.01 * attempt)
        child.kill()
        child.join()
        values = {value for tensor in load(folder).values() for value in tensor.unique().tolist()}
        assert len(values) == 1
        seen |= values
        assert BertTokenizer.from_pretrained(folder).vocab == tokenizer.vocab
    assert len(seen) > 1, "no saving was ever finished, so the test would show nothing"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_the_weights_that_were_read_is_not_said_of_those_that_are_written(key):
    """`transformers` would load fp32 weights in it."""
    assert key not in BertConfig.from_dict({key: "float16", "other": 1}).to_dict()
    assert BertConfig.from_dict({key: "float16", "other": 1}).to_dict()["other"] == 1
