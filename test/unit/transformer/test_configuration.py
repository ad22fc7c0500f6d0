"""config.json: what a model needs from it, what is refused, and what is written back."""

import json
from pathlib import Path

import pytest
from small_models import CONFIG

from transformer.configuration import BertConfig
from transformer.errors import UserError


def read(folder: Path, content: str) -> BertConfig:
    (folder / "config.json").write_text(content, encoding="utf-8")
    return BertConfig.from_pretrained(folder)


def test_unknown_keys_are_written_back_and_the_dtype_of_the_weights_is_not(tmp_path):
    """`transformers` would load the written fp32 weights in that type."""
    given = CONFIG | {"pre_trained": "", "training": "yes", "dtype": "float16", "torch_dtype": "float16"}
    config = read(tmp_path, json.dumps(given))
    written = json.loads(config.to_json())
    assert CONFIG.items() <= written.items()
    assert (written["model_type"], written["pre_trained"], written["training"]) == ("bert", "", "yes")
    assert not {"dtype", "torch_dtype"} & written.keys()
    assert BertConfig.from_dict(written).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 7}, "hidden_size is 7, expected a multiple of num_attention_heads 2"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected 1000000 at most"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 1e3}, "intermediate_size is 1000.0"),
        ({"hidden_act": "x" * 10**6}, "hidden_act is 'xxxxxxxxxxxx...xxxxxxxxxxxxx', expected one of gelu, "),
        ({"hidden_act": ["gelu"]}, "hidden_act is ['gelu']"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1"),
        ({"layer_norm_eps": True}, "layer_norm_eps is True"),
        ({"initializer_range": 1e300}, "initializer_range is 1e+300"),
        ({"pad_token_id": 9}, "pad_token_id is 9"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"id2label": ["a"]}, "id2label"),
        ({"architectures": "BertModel"}, "architectures"),
        ({"layer_norm_eps": float("nan")}, "NaN"),
        ({"id2label": {"0": "\ud800", "1": "b"}}, "surrogate"),
        ({"note": json.loads("[" * 60 + "]" * 60)}, "50 lists"),
    ],
)
def test_a_value_that_no_model_can_have_is_refused_naming_the_key(tmp_path, changes, named):
    with pytest.raises(UserError) as caught:
        read(tmp_path, json.dumps(CONFIG | changes))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("[" * 100_000, "JSON"),
        ('{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        ('{"layer_norm_eps": 1e999}', "layer_norm_eps is inf"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "JSON"),
        ("\ufffe", "JSON"),
        (" " * (17 * 2**20) + "{}", "more than the 17 MB"),
    ],
)
def test_odd_json_is_refused(tmp_path, content, named):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert named in str(caught.value)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found"):
        BertConfig.from_pretrained(tmp_path)
