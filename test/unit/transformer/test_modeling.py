"""The models' outputs: the original's figures, and those of `transformers` with the same weights."""

import pytest
import torch
import transformers
from cases import assert_close, encoder_shapes, linear, weights_of

from transformer.configuration import BertConfig
from transformer.heads import (
    BertForMaskedLM,
    BertForPreTraining,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.modeling import MASKED_SCORE, BertModel, Dropout, LayerNorm, _as_wide_as

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, segments and mask [4, 12] of examples of 12, 7, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, CONFIG["vocab_size"], (4, 12), generator=generator)
    columns = torch.arange(12)
    mask = (columns < torch.tensor([12, 7, 3, 1])[:, None]).long()
    segments = (columns >= torch.tensor([5, 4, 2, 1])[:, None]).long() * mask
    return ids * mask, segments, mask


def classifier(fit_size: int = 10, per_layer: bool = False, **changes) -> TinyBertForSequenceClassification:
    """A small classifier of golden weights, dropout off."""
    model = TinyBertForSequenceClassification(BertConfig.from_dict(CONFIG | changes), 3, fit_size, per_layer)
    model.load_state_dict(weights_of({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}))
    return model.eval()


def reference(kind: type[transformers.PreTrainedModel], **changes) -> transformers.PreTrainedModel:
    """A model of `transformers` with larger random weights than it starts with, so that its layers matter."""
    config = transformers.BertConfig(**(CONFIG | changes), initializer_range=0.2)
    config._attn_implementation = "eager"  # the one that gives its attention out
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_activations_are_the_originals(golden, role):
    fit_size = golden.case["teacher"]["hidden_size"]
    model = TinyBertForSequenceClassification(
        BertConfig.from_dict(golden.config(role)), golden.case["num_labels"], fit_size
    )
    model.load(golden.weights(role), role)
    with torch.no_grad():
        out = model.eval()(*golden.inputs(), is_student=role == "student")
    assert_close(out.logits, golden.figures[f"{role}_logits"], atol=1e-5)
    assert_close(torch.stack(out.hidden_states), golden.figures[f"{role}_reps"], atol=1e-5)
    scores, expected = torch.stack(out.attention_scores), golden.tensor(f"{role}_atts")
    real = golden.inputs()[2][None, :, None, None, :].expand_as(expected).bool()
    assert_close(scores[real], expected[real], atol=1e-5)
    assert (expected[~real] < -9000).all()
    assert_close(scores[~real], expected[~real], rtol=1e-6)


def test_hidden_states_and_pooled_output_equal_those_of_transformers():
    theirs = reference(transformers.BertModel)
    ours = BertModel(BertConfig.from_dict(CONFIG)).eval()
    ours.load_state_dict({k: t for k, t in theirs.state_dict().items() if "position_ids" not in k})
    ids, segments, mask = inputs()
    with torch.no_grad():
        out = ours(ids, segments, mask)
        expected = theirs(
            input_ids=ids,
            token_type_ids=segments,
            attention_mask=mask,
            output_hidden_states=True,
            output_attentions=True,
        )
    assert len(out.hidden_states) == len(expected.hidden_states) == 4
    for state, their_state in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(state, their_state, atol=1e-5)
    for scores, probabilities in zip(out.attention_scores, expected.attentions, strict=True):
        assert_close(scores.softmax(dim=-1), probabilities, atol=1e-5)
    assert_close(out.pooled, expected.pooler_output, atol=1e-5)
    with torch.no_grad():
        assert_close(ours(ids).pooled, theirs(input_ids=ids).pooler_output, atol=1e-5)  # one segment, no padding


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_masked_language_model_logits_equal_those_of_transformers(hidden_act):
    theirs = reference(transformers.BertForMaskedLM, hidden_act=hidden_act)
    ours = BertForMaskedLM(BertConfig.from_dict(CONFIG | {"hidden_act": hidden_act})).eval()
    report = ours.load(theirs.state_dict(), "transformers")
    assert set(report.missing) <= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # not computed
    ids, segments, mask = inputs()
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=segments, attention_mask=mask).logits
        assert_close(ours(ids, segments, mask), expected, atol=1e-5)


def test_pre_training_logits_equal_those_of_transformers():
    theirs = reference(transformers.BertForPreTraining)
    ours = BertForPreTraining(BertConfig.from_dict(CONFIG)).eval()
    report = ours.load(theirs.state_dict(), "transformers")
    assert report.missing == ()
    ids, segments, mask = inputs()
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=segments, attention_mask=mask)
        words, next_sentence = ours(ids, segments, mask)
    assert_close(words, expected.prediction_logits, atol=1e-5)
    assert_close(next_sentence, expected.seq_relationship_logits, atol=1e-5)


def test_padding_changes_nothing_at_real_tokens():
    model = classifier()
    ids, segments, mask = inputs()
    with torch.no_grad():
        padded = model(ids, segments, mask)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            alone = model(ids[row : row + 1, :length], segments[row : row + 1, :length])
            assert_close(padded.logits[row], alone.logits[0], atol=1e-6)
            for state, own_state in zip(padded.hidden_states, alone.hidden_states, strict=True):
                assert_close(state[row, :length], own_state[0], atol=1e-5)
            for scores, own_scores in zip(padded.attention_scores, alone.attention_scores, strict=True):
                assert_close(scores[row, :, :length, :length], own_scores[0], atol=1e-5)


@pytest.mark.parametrize("is_student", [False, True])
@pytest.mark.parametrize(
    ("hidden_layers", "attention_layers"), [((), ()), ((0, 2), (2,)), ((3, 1), (1, 3)), ((0,), ()), ((), (3,))]
)
def test_the_layers_asked_for_are_the_same_tensors_as_among_all(hidden_layers, attention_layers, is_student):
    model = classifier()
    with torch.no_grad():
        every = model(*inputs(), is_student=is_student)
        for with_logits in (True, False):
            some = model(
                *inputs(),
                is_student=is_student,
                hidden_layers=hidden_layers,
                attention_layers=attention_layers,
                with_logits=with_logits,
            )
            assert len(some.hidden_states) == len(hidden_layers)
            assert len(some.attention_scores) == len(attention_layers)
            for layer, state in zip(hidden_layers, some.hidden_states, strict=True):
                assert torch.equal(state, every.hidden_states[layer])
            for layer, scores in zip(attention_layers, some.attention_scores, strict=True):
                assert torch.equal(scores, every.attention_scores[layer - 1])
            if with_logits:
                assert_close(some.logits, every.logits, atol=1e-6)  # the last layer may be that of one token alone
            else:
                assert some.logits is None


@pytest.mark.parametrize(
    ("hidden_layers", "attention_layers", "with_logits", "depth"),
    [((0, 1), (1,), False, 1), ((0,), (), False, 0), ((), (2,), False, 2), ((), (), True, 3)],
)
def test_no_layer_is_computed_that_nobody_asked_for(hidden_layers, attention_layers, with_logits, depth):
    model = classifier()
    computed = []
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda *_, number=number: computed.append(number))
    model.bert.pooler.register_forward_hook(lambda *_: computed.append("pooler"))
    model(*inputs(), hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=with_logits)
    assert computed == [*range(depth), *(["pooler"] if with_logits else [])]


@pytest.mark.parametrize(
    ("hidden_layers", "attention_layers", "with_logits", "tokens"),
    [
        ((), (), True, 1),
        ((0, 2), (2,), True, 1),
        ((3,), (), True, None),
        ((), (3,), True, None),
        ((), (3,), False, None),
    ],
)
def test_of_a_last_layer_that_only_the_pooler_reads_one_token_is_computed(
    hidden_layers, attention_layers, with_logits, tokens
):
    model = classifier()
    shapes = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda _, __, output: shapes.append(output[0].shape[1]))
        layer.intermediate.register_forward_hook(lambda _, __, output: shapes.append(output.shape[1]))
    model(*inputs(), hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=with_logits)
    length = inputs()[0].shape[1]
    assert shapes == [length] * 4 + [tokens or length] * 2


def test_each_layer_has_its_own_projection_where_the_checkpoint_has():
    """Trap 32: `fit_denses.0` is the embeddings', `fit_denses.N` layer N's."""
    model = classifier(per_layer=True)
    assert "fit_dense.weight" not in model.state_dict()
    with torch.no_grad():
        plain = model(*inputs(), hidden_layers=(0, 3))
        projected = model(*inputs(), is_student=True, hidden_layers=(0, 3))
    for layer, state, fitted in zip((0, 3), plain.hidden_states, projected.hidden_states, strict=True):
        weights = model.state_dict()
        expected = state @ weights[f"fit_denses.{layer}.weight"].T + weights[f"fit_denses.{layer}.bias"]
        assert_close(fitted, expected, atol=1e-6)


def test_one_projection_serves_all_layers():
    model = classifier()
    with torch.no_grad():
        plain = model(*inputs()).hidden_states
        projected = model(*inputs(), is_student=True).hidden_states
    for state, fitted in zip(plain, projected, strict=True):
        assert_close(fitted, model.fit_dense(state).detach(), atol=1e-6)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "TinyBertForSequenceClassification", None])
def test_the_config_says_whether_the_classifier_reads_the_relu(architecture):
    """Trap 31: a relu where the classifier was trained without one gives other logits."""
    model = classifier(architectures=None if architecture is None else [architecture])
    with torch.no_grad():
        pooled = model.bert(*inputs()).pooled
        assert (pooled < 0).any()
        read = pooled if architecture == "BertForSequenceClassification" else pooled.relu()
        assert_close(model(*inputs()).logits, model.classifier(read), atol=1e-6)


def test_general_distillations_student_gives_every_layer_in_the_teachers_size():
    model = TinyBertForPreTraining(BertConfig.from_dict(CONFIG), fit_size=10).eval()
    with torch.no_grad():
        out = model(*inputs())
        encoded = model.bert(*inputs())
    assert out.logits is None
    assert [tuple(state.shape) for state in out.hidden_states] == [(4, 12, 10)] * 4
    for state, own in zip(out.hidden_states, encoded.hidden_states, strict=True):
        assert_close(state, model.fit_dense(own).detach(), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(out.attention_scores, encoded.attention_scores, strict=True))


def test_modules_are_named_as_the_released_checkpoints():
    expected = encoder_shapes(CONFIG) | linear("classifier", 24, 3) | linear("fit_dense", 24, 10)
    assert {key: tuple(tensor.shape) for key, tensor in classifier().state_dict().items()} == expected


def test_new_weights_are_drawn_as_bert_draws_them():
    config = BertConfig.from_dict(CONFIG | {"vocab_size": 5000, "initializer_range": 0.05})
    for model in (TinyBertForSequenceClassification(config), BertForMaskedLM(config)):
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                assert not tensor.any(), name
            elif "LayerNorm" in name:
                assert (tensor == 1).all(), name
            elif tensor.numel() > 1000:
                assert tensor.std().item() == pytest.approx(0.05, rel=0.1), name


def test_dropout_acts_in_training_alone():
    model = classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    with torch.no_grad():
        first, second = model(*inputs()).logits, model(*inputs()).logits
        assert torch.equal(first, second)
        model.train()
        first, second = model(*inputs()).logits, model(*inputs()).logits
        assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_with_a_residual_is_dropout_and_then_the_residual(dtype):
    """From the same random numbers; in half precision it rounds less. The gradient is that of what was kept."""
    dropout = Dropout(0.3).train()
    states, residual = torch.randn(7, 5, 33), torch.randn(7, 5, 33)
    plain, added = (states.to(dtype).requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    right = dropout(plain) + residual
    torch.manual_seed(5)
    ours = dropout.add(added, residual)
    resolution = 8 * torch.finfo(dtype).eps
    assert ours.dtype == right.dtype
    assert 0.2 < (ours == residual).float().mean() < 0.4
    assert_close(ours.detach(), right.detach(), atol=resolution, rtol=resolution)
    (right * residual).sum().backward()
    (ours * residual).sum().backward()
    assert_close(added.grad.float(), plain.grad.float(), atol=resolution, rtol=resolution)
    assert torch.equal(dropout.eval().add(states, residual), states + residual)


def test_dropout_of_nearly_all_is_finite():
    states = torch.randn(9, 70)
    dropped = Dropout(0.999999).train()(states)
    assert dropped.isfinite().all()
    assert (dropped == 0).float().mean() > 0.99


@pytest.mark.parametrize("length", [5, 16, 64, 70])
def test_a_mask_hides_the_same_keys_in_half_precision(length):
    """Few keys and many, which a CPU adds in other ways: what is masked does not show."""
    model = classifier(max_position_embeddings=80)
    ids = torch.randint(1, 20, (3, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    others = torch.where(mask == 1, ids, ids % 7 + 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = (model(texts, None, mask) for texts in (ids, others))
    assert not torch.equal(ids, others)
    assert torch.equal(first.logits, second.logits)
    scores = first.attention_scores[0]
    assert (scores[1, :, :, length // 2 :] < MASKED_SCORE / 2).all()
    assert (scores[[0, 2]] > MASKED_SCORE / 2).all()
    assert (scores[1, :, :, : length // 2] > MASKED_SCORE / 2).all()


@pytest.mark.parametrize(("dtype", "keys", "wide"), [("bfloat16", 64, 5), ("bfloat16", 65, 1), ("float32", 8, 1)])
def test_a_mask_is_widened_where_keys_are_few(dtype, keys, wide):
    mask = torch.randn(2, 1, 1, keys).to(getattr(torch, dtype))
    scores = torch.zeros(2, 3, 5, keys, dtype=mask.dtype)
    ours = _as_wide_as(mask, scores)
    assert ours.shape == (2, 1, wide, keys)
    assert torch.equal(scores + ours, scores + mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_normalisation_is_right_in_half_precision(dtype):
    """Trap 9: in fp16 eps 1e-12 is 0, and a constant row gave 0 / 0; squares beyond 65504 gave infinity."""
    norm = LayerNorm(6, eps=1e-12)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5, 0.25, 2.0]))
    rows = torch.tensor([[3.0] * 6, [0.0] * 6, [1000.0, -1000.0, 500.0, 0.0, -500.0, 250.0]]).to(dtype)
    exact = rows.double()
    centred = exact - exact.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias
    resolution = torch.finfo(dtype).eps
    for module in (norm, norm.to(dtype)):
        out = module(rows)
        assert out.dtype == dtype
        assert_close(out.detach().double(), expected.detach(), atol=8 * resolution)
        with torch.autocast("cpu", dtype=dtype):
            assert_close(module(rows).detach().double(), expected.detach(), atol=8 * resolution)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_stays_finite(dtype):
    """Trap 9: all-zero embeddings make every row constant; rows that are all padding are there too."""
    model = classifier().to(dtype)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.zero_()
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        ids, segments, mask = inputs()
        out = model(ids, segments, mask * torch.tensor([[1], [1], [1], [0]]))
    for tensor in (out.logits, *out.hidden_states, *out.attention_scores):
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()
