"""The outputs of models equal the original's figures, and those of `transformers` with the same weights."""

import pytest
import small_models
import torch
import transformers
from cases import assert_close, encoder_shapes, linear, weights_of

from transformer.configuration import BertConfig
from transformer.heads import (
    BertForMaskedLM,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.layers import Dropout, LayerNorm, expand_mask
from transformer.modeling import MASKED_SCORE, BertModel

CONFIG = small_models.CONFIG | {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, segments and mask [4, 12] of examples of 12, 7, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, CONFIG["vocab_size"], (4, 12), generator=generator)
    columns = torch.arange(12)
    mask = (columns < torch.tensor([12, 7, 3, 1])[:, None]).long()
    segments = (columns >= torch.tensor([5, 4, 2, 1])[:, None]).long() * mask
    return ids * mask, segments, mask


def classifier(fit_size: int = 10, per_layer: bool = False, **changes) -> TinyBertForSequenceClassification:
    """Return a small classifier with golden weights, in eval mode."""
    model = TinyBertForSequenceClassification(BertConfig.from_dict(CONFIG | changes), 3, fit_size, per_layer)
    model.load_state_dict(weights_of({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}))
    return model.eval()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_activations_equal_the_originals(golden, role):
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
    """The heads and the other activations are compared in test_weight_files.py."""
    config = transformers.BertConfig(**CONFIG, initializer_range=0.2)
    config._attn_implementation = "eager"  # the others return no attention
    torch.manual_seed(1)
    theirs = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # new biases are 0
    ours = BertModel(BertConfig.from_dict(CONFIG)).eval()
    ours.load_state_dict({k: t for k, t in theirs.state_dict().items() if "position_ids" not in k})
    ids, segments, mask = inputs()
    with torch.no_grad():
        out = ours(ids, segments, mask)
        expected = theirs(ids, mask, segments, output_hidden_states=True, output_attentions=True)
        assert_close(ours(ids).pooled, theirs(ids).pooler_output, atol=1e-5)  # one segment, no padding
    assert_close(torch.stack(out.hidden_states), torch.stack(expected.hidden_states), atol=1e-5)
    assert_close(torch.stack(out.attention_scores).softmax(dim=-1), torch.stack(expected.attentions), atol=1e-5)
    assert_close(out.pooled, expected.pooler_output, atol=1e-5)


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
def test_named_layers_are_the_same_tensors_as_among_all_layers(hidden_layers, attention_layers, is_student):
    model, layers = classifier(), {"hidden_layers": hidden_layers, "attention_layers": attention_layers}
    with torch.no_grad():
        every = model(*inputs(), is_student=is_student)
        for with_logits in (True, False):
            some = model(*inputs(), is_student=is_student, with_logits=with_logits, **layers)
            for layer, state in zip(hidden_layers, some.hidden_states, strict=True):
                assert torch.equal(state, every.hidden_states[layer])
            for layer, scores in zip(attention_layers, some.attention_scores, strict=True):
                assert torch.equal(scores, every.attention_scores[layer - 1])
            if with_logits:
                assert_close(some.logits, every.logits, atol=1e-6)  # the last layer may compute one token only
            else:
                assert some.logits is None


@pytest.mark.parametrize(
    ("hidden_layers", "attention_layers", "with_logits", "tokens"),
    [
        ((0,), (), False, []),
        ((0, 1), (1,), False, [12]),
        ((), (2,), False, [12, 12]),
        ((), (3,), False, [12, 12, 12]),
        ((), (), True, [12, 12, 1]),
        ((0, 2), (2,), True, [12, 12, 1]),
        ((3,), (), True, [12, 12, 12]),
        ((), (3,), True, [12, 12, 12]),
    ],
)
def test_only_needed_layers_and_tokens_are_computed(hidden_layers, attention_layers, with_logits, tokens):
    """The pooler reads only the first token of the last layer."""
    model = classifier()
    computed = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, __, output: computed.append(output.shape[1]))
    model.bert.pooler.register_forward_hook(lambda *_: computed.append("pooler"))
    model(*inputs(), hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=with_logits)
    assert computed == [*tokens, *(["pooler"] if with_logits else [])]


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_student_projects_its_hidden_states(per_layer):
    """Trap 32: by `fit_dense`, or by `fit_denses.0` for the embeddings and `fit_denses.N` for layer N."""
    model = classifier(per_layer=per_layer)
    weights = model.state_dict()
    with torch.no_grad():
        plain = model(*inputs(), hidden_layers=(0, 3))
        projected = model(*inputs(), is_student=True, hidden_layers=(0, 3))
    for layer, state, fitted in zip((0, 3), plain.hidden_states, projected.hidden_states, strict=True):
        name = f"fit_denses.{layer}" if per_layer else "fit_dense"
        assert_close(fitted, state @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], atol=1e-6)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "TinyBertForSequenceClassification", None])
def test_the_architecture_of_the_config_decides_about_the_relu(architecture):
    """Trap 31: a relu gives wrong logits if the classifier was trained without one."""
    model = classifier(architectures=None if architecture is None else [architecture])
    with torch.no_grad():
        pooled = model.bert(*inputs()).pooled
        assert (pooled < 0).any()
        read = pooled if architecture == "BertForSequenceClassification" else pooled.relu()
        assert_close(model(*inputs()).logits, model.classifier(read), atol=1e-6)


def test_the_student_of_general_distillation_projects_every_layer():
    model = TinyBertForPreTraining(BertConfig.from_dict(CONFIG), fit_size=10).eval()
    with torch.no_grad():
        out = model(*inputs())
        encoded = model.bert(*inputs())
    assert out.logits is None
    assert [tuple(state.shape) for state in out.hidden_states] == [(4, 12, 10)] * 4
    for state, own in zip(out.hidden_states, encoded.hidden_states, strict=True):
        assert_close(state, model.fit_dense(own).detach(), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(out.attention_scores, encoded.attention_scores, strict=True))


def test_keys_and_shapes_are_those_of_the_released_checkpoints():
    expected = encoder_shapes(CONFIG) | linear("classifier", 24, 3) | linear("fit_dense", 24, 10)
    assert {key: tuple(tensor.shape) for key, tensor in classifier().state_dict().items()} == expected


def test_new_weights_are_drawn_with_the_initializer_range():
    config = BertConfig.from_dict(CONFIG | {"vocab_size": 5000, "initializer_range": 0.05})
    for model in (TinyBertForSequenceClassification(config), BertForMaskedLM(config)):
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                assert not tensor.any(), name
            elif "LayerNorm" in name:
                assert (tensor == 1).all(), name
            elif tensor.numel() > 1000:
                assert tensor.std().item() == pytest.approx(0.05, rel=0.1), name


def test_dropout_acts_only_in_training():
    model = classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    with torch.no_grad():
        assert torch.equal(model(*inputs()).logits, model(*inputs()).logits)
        model.train()
        assert not torch.equal(model(*inputs()).logits, model(*inputs()).logits)
        dropped = Dropout(0.999999).train()(torch.randn(9, 70))
    assert dropped.isfinite().all()
    assert (dropped == 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_with_a_residual_equals_dropout_and_then_the_residual(dtype):
    """With the same random numbers; in half precision it rounds less."""
    dropout = Dropout(0.3).train()
    states, residual = torch.randn(7, 5, 33), torch.randn(7, 5, 33)
    plain, added = (states.to(dtype).requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    expected = dropout(plain) + residual
    torch.manual_seed(5)
    ours = dropout.add(added, residual)
    resolution = 8 * torch.finfo(dtype).eps
    assert ours.dtype == expected.dtype
    assert 0.2 < (ours == residual).float().mean() < 0.4
    assert_close(ours.detach(), expected.detach(), atol=resolution, rtol=resolution)
    for out in (expected, ours):
        (out * residual).sum().backward()
    assert_close(added.grad.float(), plain.grad.float(), atol=resolution, rtol=resolution)
    assert torch.equal(dropout.eval().add(states, residual), states + residual)


@pytest.mark.parametrize("length", [5, 16, 64, 70])
def test_masked_tokens_do_not_change_the_logits_in_half_precision(length):
    """A CPU adds the masks of few and of many keys differently."""
    model = classifier(max_position_embeddings=80)
    ids = torch.randint(1, 20, (3, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = (model(texts, None, mask) for texts in (ids, torch.where(mask == 1, ids, ids % 7 + 1)))
    assert torch.equal(first.logits, second.logits)
    masked = first.attention_scores[0] < MASKED_SCORE / 2
    assert torch.equal(masked, (mask == 0)[:, None, None, :].expand_as(masked))


@pytest.mark.parametrize(("dtype", "keys", "rows"), [("bfloat16", 64, 5), ("bfloat16", 65, 1), ("float32", 8, 1)])
def test_a_mask_of_few_keys_is_expanded_over_queries_in_half_precision(dtype, keys, rows):
    mask = torch.randn(2, 1, 1, keys).to(getattr(torch, dtype))
    scores = torch.zeros(2, 3, 5, keys, dtype=mask.dtype)
    ours = expand_mask(mask, scores)
    assert ours.shape == (2, 1, rows, keys)
    assert torch.equal(scores + ours, scores + mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_normalisation_is_exact_in_half_precision(dtype):
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
