"""The masked-LM head: its forms in checkpoints, its predictions for one token of each text, and its training."""

import json

import numpy as np
import pytest
import torch
import transformers
from augmentation_cases import VOCABULARY, Place, config_of, head_shapes, masked_lm
from cases import edit_weights, encoder_shapes, weights_of

from distillation.runs.mlm_head import (
    IGNORED,
    encode_texts,
    load_masked_lm,
    masked_accuracy,
    masked_batch,
    train_masked_lm,
)
from transformer.errors import UserError
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

WORDS = "cls.predictions.decoder.weight"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def scores(model: BertForMaskedLM) -> torch.Tensor:
    ids = torch.tensor([[2, 7, 4, 9, 3], [2, 4, 21, 30, 3]])
    with torch.no_grad():
        return model.eval()(ids, torch.tensor([[0, 0, 0, 1, 1]]).expand_as(ids))


@pytest.fixture
def folder(tmp_path):
    return masked_lm(tmp_path / "bert")


def test_all_forms_of_the_head_give_the_same_scores(folder):
    """With gamma and beta as in the original; with tied output weights; with the bias only at the decoder."""
    expected = scores(BertForMaskedLM.from_pretrained(folder))

    def old(weights):
        for new, name in (("weight", "gamma"), ("bias", "beta")):
            weights[f"cls.predictions.transform.LayerNorm.{name}"] = weights.pop(
                f"cls.predictions.transform.LayerNorm.{new}"
            )
        weights[WORDS] = weights[EMBEDDINGS].clone()

    edit_weights(folder, old)
    assert torch.equal(scores(load_masked_lm(folder, True).model), expected)

    def at_the_decoder(weights):
        weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")

    edit_weights(folder, at_the_decoder)
    assert torch.equal(scores(load_masked_lm(folder, True).model), expected)


def test_untied_output_weights_and_the_embeddings_are_both_kept(folder):
    before = scores(BertForMaskedLM.from_pretrained(folder))
    edit_weights(folder, lambda weights: weights.update({WORDS: 2 * weights[EMBEDDINGS]}))
    model = BertForMaskedLM.from_pretrained(folder)
    bias = model.cls.predictions.bias
    torch.testing.assert_close(scores(model) - bias, 2 * (before - bias), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight * 2, model.cls.predictions.decoder.weight)


def test_the_scores_equal_those_of_transformers(folder):
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**config_of())).eval()
    state = weights_of(encoder_shapes(config_of()) | head_shapes(config_of()))
    state |= {WORDS: state[EMBEDDINGS], "cls.predictions.decoder.bias": state["cls.predictions.bias"]}
    theirs.load_state_dict({key: value for key, value in state.items() if "pooler" not in key}, strict=False)
    theirs.save_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    ids = torch.tensor([[2, 7, 4, 9, 3]])
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load_masked_lm(folder, True).model(ids)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_encode_one_gives_the_hidden_states_of_the_whole_forward_pass(folder):
    model = BertForMaskedLM.from_pretrained(folder).eval()
    ids = torch.randint(5, 60, (6, 11), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(11) > 5).long().expand_as(ids)
    positions = torch.tensor([0, 1, 5, 9, 10, 3])
    with torch.no_grad():
        whole = model.bert(ids, segments).hidden_states[-1][torch.arange(6), positions]
        one = model.encode_one(ids, segments, positions)
    torch.testing.assert_close(one, whole, atol=1e-5, rtol=1e-5)


def test_masks_are_chosen_as_in_bert(folder):
    """15 % of the WordPieces, at least one per text: 80 % become [MASK], 10 % another token, 10 % are unchanged."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    batch = [[2, *([40] * 500), 3], [2, 41, 3]] * 20
    ids, mask, targets = masked_batch(batch, tokenizer, np.random.default_rng(0))
    assert mask.sum(axis=1).tolist() == [502, 3] * 20
    assert (ids[1, 3:] == tokenizer.pad_token_id).all()
    chosen = targets != IGNORED
    assert not chosen[:, 0].any()
    assert chosen[1::2].sum() == 20
    assert (targets[chosen] == np.where(np.arange(len(batch)) % 2, 41, 40)[np.nonzero(chosen)[0]]).all()
    long, count = chosen[::2], 20 * 500
    assert abs(long.sum() - 0.15 * count) < 4 * np.sqrt(count * 0.15 * 0.85)
    inputs = ids[::2][long]
    for share, found in ((0.8, inputs == tokenizer.mask_token_id), (0.1, inputs == 40)):
        assert abs(found.mean() - share) < 0.05
    assert (ids[::2][~long] == np.array(batch[::2])[~long]).all()


def predictable_texts(tokenizer: BertTokenizer) -> list[list[int]]:
    """Return token ids of texts in which each word can be predicted from its neighbour."""
    pairs = ["good movie", "bad film", "great plot", "awful acting", "funny story", "sad rock"]
    return encode_texts([f"the {pair} is {pair}" for pair in pairs] * 40, tokenizer)


def test_training_a_head_raises_its_accuracy_and_is_repeatable(tmp_path):
    folder = masked_lm(tmp_path / "bare", head=False, hidden_dropout_prob=0.0)
    masked = load_masked_lm(folder, True, seed=1)
    assert not masked.has_head
    texts = predictable_texts(masked.tokenizer)
    before = masked_accuracy(masked, texts, 0)
    accuracy = train_masked_lm(masked, texts, 250, seed=1)
    assert before < 0.1
    assert accuracy > 0.6
    predictions = masked.model.cls.predictions
    assert predictions.decoder.weight is masked.model.bert.embeddings.word_embeddings.weight
    again = load_masked_lm(folder, True, seed=1)
    train_masked_lm(again, texts, 250, seed=1)
    for ours, theirs in zip(masked.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = load_masked_lm(folder, True, seed=2)
    train_masked_lm(other, texts, 5, seed=2)
    assert not torch.equal(other.model.cls.predictions.bias, predictions.bias)


def test_training_only_the_head_keeps_the_encoders_weights(tmp_path):
    masked = load_masked_lm(masked_lm(tmp_path / "bare", head=False), True)
    before = {name: tensor.clone() for name, tensor in masked.model.bert.state_dict().items()}
    train_masked_lm(masked, predictable_texts(masked.tokenizer), 20, seed=1, train_encoder=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in masked.model.bert.state_dict().items())


def test_the_command_gives_the_same_file_for_the_same_number_of_head_steps(tmp_path):
    place = Place(tmp_path)
    bare = masked_lm(tmp_path / "bare", head=False)
    output = place.run(pretrained_bert_model=bare, train_mlm_head=4).out
    assert "of held-out masked tokens correctly" in output
    made = place.made.read_bytes()
    place.run(pretrained_bert_model=bare, train_mlm_head=4, overwrite_output_file=True)
    assert place.made.read_bytes() == made
    place.run(pretrained_bert_model=bare, train_mlm_head=5, overwrite_output_file=True)
    assert place.made.read_bytes() != made


def test_too_few_texts_are_an_error(tmp_path):
    masked = load_masked_lm(masked_lm(tmp_path / "bare", head=False), True)
    with pytest.raises(UserError, match="too few texts"):
        train_masked_lm(masked, [[2, 7, 3]], 3, seed=0)


def test_long_texts_are_cut_and_empty_texts_are_left_out(folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    pieces = encode_texts(["the movie", "", "film " * 300], tokenizer)
    assert [len(text) for text in pieces] == [4, 128]
    assert [len(text) for text in encode_texts(["film " * 300, "the"], tokenizer, 64)] == [64, 3]
    assert json.dumps(pieces[0]) == json.dumps([2, VOCABULARY.index("the"), VOCABULARY.index("movie"), 3])
