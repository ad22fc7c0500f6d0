"""Packed inference on a CPU: the outputs equal those in fp32, up to the rounding of bf16."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from cases import report_lack
from torch import Tensor, nn
from torch.nn import functional

from distillation.runtime.precision import TorchMixedPrecision
from transformer import packed_inference
from transformer.configuration import BertConfig
from transformer.heads import BertForMaskedLM, TinyBertForSequenceClassification
from transformer.modeling import MASKED_SCORE, BertSelfAttention

CPU = torch.device("cpu")
ROUNDING = 2.0**-8  # bf16 has 8 significant bits: a rounding changes a number by at most this share
OF_A_PRODUCT = 3  # roundings: of the input, of the weights and of the output
LINEAR_LAYERS = 2 * 6 + 2  # of `model`: six in each layer, the pooler and the classifier


def model(hidden_act: str = "gelu") -> TinyBertForSequenceClassification:
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, hidden_act=hidden_act)
    built = TinyBertForSequenceClassification(config, 3, 0)
    for parameter in built.parameters():  # new weights are too small for an activation to matter
        nn.init.normal_(parameter, std=0.3)
    return built.eval().requires_grad_(False)


def outputs(built: nn.Module, batch: int, length: int, amp: bool = True) -> list[Tensor]:
    """Return logits, hidden states and attention scores."""
    ids = torch.arange(batch * length).remainder(50).view(batch, length)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = built(ids, torch.zeros_like(ids), mask)
    return [out.logits, *out.hidden_states, *out.attention_scores]


def linear_layers(built: nn.Module) -> list[nn.Linear]:
    return [module for module in built.modules() if isinstance(module, nn.Linear)]


def if_packed(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of packed layers; on a processor without them, check that the plain ones stay, and report that."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        if packed_inference.can_pack():
            test(*args, **kwargs)
            return
        built = model()
        TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0).prepare_for_inference(built)
        assert len(linear_layers(built)) == LINEAR_LAYERS
        report_lack("bf16 products of oneDNN; frozen models keep their plain linear layers")

    return run


def assert_rounded(actual: Tensor, exact: Tensor, roundings: int) -> None:
    """Assert that a tensor equals the exact one up to so many successive roundings to bf16."""
    assert actual.shape == exact.shape
    assert (actual.float() - exact).norm() <= roundings * ROUNDING * exact.norm()


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "tanh"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (8, 16)])
def test_packed_and_plain_layers_give_the_outputs_of_fp32(hidden_act, batch, length, monkeypatch):
    """The packed layers on a processor that has them, the plain ones on every processor."""
    mixed = TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0)
    exact = model(hidden_act)
    chosen, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    mixed.prepare_for_inference(chosen)
    assert len(linear_layers(chosen)) == (0 if packed_inference.can_pack() else LINEAR_LAYERS)
    monkeypatch.setattr(packed_inference, "can_pack", lambda: False)
    mixed.prepare_for_inference(plain)
    assert len(linear_layers(plain)) == LINEAR_LAYERS
    ours, theirs, expected = (
        outputs(chosen, batch, length),
        outputs(plain, batch, length),
        outputs(exact, batch, length, False),
    )
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        # Value, context, output and the two feed-forward products of two layers, pooler and classifier: 12 in a row.
        assert_rounded(one, right, 12)
        assert_rounded(other, right, 12)


@if_packed
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 32), (13, 32), (3, 11, 32), (5, 131, 32)])
@pytest.mark.parametrize("bucket_rows", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_layer_equals_the_plain_one_and_its_activation(shape, bucket_rows, threads, monkeypatch):
    """Padded rows are dropped; rows that two threads share on AMX keep their order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert packed_inference.rows_per_product(5 * 131, 512, 2) < 5 * 131
    linear, states = nn.Linear(32, 512), torch.randn(shape)
    expected = linear(states)
    for name, activated in (
        (None, expected),
        ("gelu", functional.gelu(expected)),
        ("gelu_new", functional.gelu(expected, approximate="tanh")),
        ("relu", functional.relu(expected)),
    ):
        assert_rounded(packed_inference.PackedLinear(linear, name, bucket_rows)(states), activated, OF_A_PRODUCT)


def test_rows_are_split_if_two_threads_would_not_share_them():
    for rows in range(385, 1536):
        part = packed_inference.rows_per_product(rows, 768, 2)
        assert part % 32 == 0
        assert part <= 320
        assert -(-rows // part) == -(-rows // 320)  # no more parts than needed
    for whole in ((384, 768, 2), (1536, 768, 2), (640, 2304, 2), (640, 312, 2), (640, 768, 1), (640, 768, 8)):
        assert packed_inference.rows_per_product(*whole) == whole[0]


def test_row_counts_are_few_and_pad_by_less_than_64():
    counts = [packed_inference.row_count(rows) for rows in range(1, 1601)]
    assert all(0 <= count - rows < 64 for rows, count in enumerate(counts, start=1))
    assert all(packed_inference.row_count(count) == count for count in counts)
    assert len(set(counts)) == 16 + 21


@if_packed
@torch.no_grad()
def test_the_head_of_the_masked_lm_is_packed():
    torch.manual_seed(3)
    head = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).eval()
    transform = head.cls.predictions.transform
    nn.init.normal_(transform.dense.weight, std=0.3)
    states = torch.randn(7, 32)
    expected = transform(states)
    packed_inference.pack_linear_layers(head)
    assert not isinstance(transform.dense, nn.Linear)
    assert_rounded(transform(states.bfloat16()), expected, OF_A_PRODUCT + 1)  # and of the normalised states


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_fused_attention_is_as_exact_as_unfused(length):
    """With `fused` off, scores or not makes no difference."""
    torch.manual_seed(4)
    attention = BertSelfAttention(BertConfig(hidden_size=32, num_attention_heads=4)).eval()
    for linear in (attention.query, attention.key, attention.value):
        nn.init.normal_(linear.weight, std=0.3)
    hidden = torch.randn(5, length, 32)
    mask = torch.zeros(5, 1, 1, length)
    mask[1, :, :, -(-length // 2) :] = MASKED_SCORE
    for queries in (None, 1):
        expected, _ = attention(hidden, mask, True, queries)
        with torch.autocast("cpu", torch.bfloat16):
            attention.fused = True
            fused, nothing = attention(hidden, mask, False, queries)
            plain, scores = attention(hidden, mask, True, queries)
            attention.fused = False
            assert torch.equal(attention(hidden, mask, False, queries)[0], plain)
        assert (nothing, fused.dtype) == (None, plain.dtype)
        assert scores is not None
        for context in (fused, plain):  # states and weights; query, key and value; probabilities; the context
            assert_rounded(context, expected, 4)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("dtype", "level"), [(torch.float16, "O1"), (torch.bfloat16, "O2"), (torch.bfloat16, "O1")])
def test_layers_are_packed_only_with_onednn_in_bf16_at_level_o1(dtype, level, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    built = model()
    TorchMixedPrecision(CPU, dtype, level, 128.0).prepare_for_inference(built)
    packed = packed_inference.can_pack() and (dtype, level) == (torch.bfloat16, "O1")
    assert {layer.weight.dtype for layer in linear_layers(built)} == (set() if packed else {dtype})


@if_packed
@torch.no_grad()
def test_packed_attention_computes_the_first_queries():
    whole_model = model()
    attention = whole_model.bert.encoder.layer[0].attention
    hidden, mask = torch.randn(3, 7, 32), torch.zeros(3, 1, 1, 7)
    expected = attention.self(hidden, mask, True, 2)
    packed_inference.pack_linear_layers(whole_model)
    # Roundings of states and weights; of query, key and value; of scores or probabilities; of the context.
    for ours, theirs in zip(attention.self(hidden, mask, True, 2), expected, strict=True):
        assert_rounded(ours, theirs, 4)
