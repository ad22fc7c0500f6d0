"""Models that are asked only, with their linear layers in a CPU's own layout: the same numbers, faster."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from cases import report_lack
from torch import Tensor, nn

from distillation.runtime.precision import TorchMixedPrecision
from transformer import packed_inference
from transformer.configuration import BertConfig
from transformer.heads import BertForMaskedLM, TinyBertForSequenceClassification
from transformer.modeling import MASKED_SCORE, BertSelfAttention

CPU = torch.device("cpu")
ROUNDING = 2.0**-8  # bf16 has 8 significant bits: at most this share of a number is lost where it is rounded
OF_A_PRODUCT = 3  # roundings: of what goes in, of the weights, and of what comes out
LINEAR_LAYERS = 2 * 6 + 2  # of `model`: six in each layer, the pooler and the classifier


def model(hidden_act: str = "gelu") -> TinyBertForSequenceClassification:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_act=hidden_act,
    )
    built = TinyBertForSequenceClassification(config, 3, 0)
    for parameter in built.parameters():  # new weights are so small that an activation would not show
        nn.init.normal_(parameter, std=0.3)
    return built.eval().requires_grad_(False)


def asked(built: nn.Module, batch: int, length: int, amp: bool = True):
    ids = torch.arange(batch * length).remainder(50).view(batch, length)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return built(ids, torch.zeros_like(ids), mask)


def linear_layers(built: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in built.modules())


def where_packed(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of the packed layers; a processor without them must keep the plain ones, and the test reports it."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        if packed_inference.can_pack():
            test(*args, **kwargs)
            return
        built = model()
        TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0).prepare_for_inference(built)
        assert linear_layers(built) == LINEAR_LAYERS
        report_lack("bf16 products of oneDNN; frozen models keep their plain linear layers")

    return run


def assert_rounded(actual: Tensor, exact: Tensor, roundings: int) -> None:
    """Assert that a tensor is the exact one but for so many roundings to bf16 in a row."""
    assert actual.shape == exact.shape
    assert (actual.float() - exact).norm() <= roundings * ROUNDING * exact.norm()


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "tanh"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (8, 16)])
def test_packed_and_plain_layers_give_the_outputs_of_fp32(hidden_act, batch, length, monkeypatch):
    """But for the roundings of bf16; the packed layers where the processor has them, the plain ones everywhere."""
    mixed = TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0)
    exact = model(hidden_act)
    chosen, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    mixed.prepare_for_inference(chosen)
    assert linear_layers(chosen) == (0 if packed_inference.can_pack() else LINEAR_LAYERS)
    monkeypatch.setattr(packed_inference, "can_pack", lambda: False)
    mixed.prepare_for_inference(plain)
    assert linear_layers(plain) == LINEAR_LAYERS
    ours, theirs = asked(chosen, batch, length), asked(plain, batch, length)
    truth = asked(exact, batch, length, amp=False)
    for one, other, right in zip(
        (ours.logits, *ours.hidden_states, *ours.attention_scores),
        (theirs.logits, *theirs.hidden_states, *theirs.attention_scores),
        (truth.logits, *truth.hidden_states, *truth.attention_scores),
        strict=True,
    ):
        assert one.dtype == other.dtype
        # Value, context, output and the two feed-forward products of two layers, pooler and classifier: 12 in a row.
        assert_rounded(one, right, 12)
        assert_rounded(other, right, 12)


@where_packed
@torch.no_grad()
def test_the_activation_is_applied_once():
    """Told against fp32, where gelu of gelu would be far off."""
    linear = nn.Linear(32, 48)
    states = torch.randn(4, 7, 32)
    right = nn.functional.gelu(linear(states))
    ours = packed_inference.PackedLinear(linear, "gelu")(states)
    tanh = packed_inference.PackedLinear(linear, "gelu_new")(states)
    plain = packed_inference.PackedLinear(linear)(states)
    assert_rounded(ours, right, OF_A_PRODUCT)
    assert_rounded(tanh, nn.functional.gelu(linear(states), approximate="tanh"), OF_A_PRODUCT)
    assert_rounded(plain, linear(states), OF_A_PRODUCT)


@where_packed
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 32), (13, 32), (16, 32), (3, 11, 32), (9, 37, 32)])
def test_rows_that_are_added_up_do_not_show(shape):
    linear = nn.Linear(32, 48)
    states = torch.randn(shape)
    ours = packed_inference.PackedLinear(linear, "gelu", few_sizes=True)(states)
    right = nn.functional.gelu(linear(states))
    assert_rounded(ours, right, OF_A_PRODUCT)


def test_rows_are_parted_where_two_threads_would_not_share_them():
    for rows in range(385, 1536):
        part = packed_inference.rows_at_once(rows, 768, 2)
        assert part % 32 == 0
        assert part <= 320
        assert -(-rows // part) == -(-rows // 320)  # no more parts than needed
    assert packed_inference.rows_at_once(384, 768, 2) == 384
    assert packed_inference.rows_at_once(1536, 768, 2) == 1536
    assert packed_inference.rows_at_once(640, 2304, 2) == 640
    assert packed_inference.rows_at_once(640, 312, 2) == 640
    assert {packed_inference.rows_at_once(640, 768, threads) for threads in (1, 3, 8)} == {640}


@where_packed
@torch.no_grad()
@pytest.mark.parametrize("few_sizes", [False, True])
def test_parted_rows_come_back_in_their_places(few_sizes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    linear = nn.Linear(32, 512)
    states = torch.randn(5, 131, 32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    packed = packed_inference.PackedLinear(linear, "gelu", few_sizes=few_sizes)
    taken: list[int] = []
    multiplied = packed._multiplied
    monkeypatch.setattr(packed, "_multiplied", lambda rows: taken.append(len(rows)) or multiplied(rows))
    ours = packed(states)
    right = nn.functional.gelu(linear(states))
    assert len(taken) == 3
    assert_rounded(ours, right, OF_A_PRODUCT)


def test_few_row_counts_take_all():
    counts = [packed_inference.row_count(rows) for rows in range(1, 1601)]
    assert all(0 <= count - rows < 64 for rows, count in enumerate(counts, start=1))
    assert all(packed_inference.row_count(count) == count for count in counts)
    assert len(set(counts)) == 16 + 21


@where_packed
def test_the_masked_lms_head_is_packed_too():
    torch.manual_seed(3)
    head = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).eval()
    transform = head.cls.predictions.transform
    nn.init.normal_(transform.dense.weight, std=0.3)
    states = torch.randn(7, 32)
    with torch.no_grad():
        right = transform(states)
        packed_inference.pack_linear_layers(head)
        ours = transform(states.bfloat16()).float()
    assert not isinstance(transform.dense, nn.Linear)
    assert_rounded(ours, right, OF_A_PRODUCT + 1)  # and of the normalised states


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_attention_in_one_kernel_is_as_exact(length):
    """Where it is turned on: as the way that gives scores, against fp32. Else scores or not are the same."""
    torch.manual_seed(4)
    attention = BertSelfAttention(BertConfig(hidden_size=32, num_attention_heads=4)).eval()
    for linear in (attention.query, attention.key, attention.value):
        nn.init.normal_(linear.weight, std=0.3)
    hidden = torch.randn(5, length, 32)
    mask = torch.zeros(5, 1, 1, length)
    mask[1, :, :, -(-length // 2) :] = MASKED_SCORE
    for queries in (None, 1):
        right, _ = attention(hidden, mask, True, queries)
        with torch.autocast("cpu", torch.bfloat16):
            attention.fused = True
            fused, nothing = attention(hidden, mask, False, queries)
            plain, scores = attention(hidden, mask, True, queries)
            attention.fused = False
            assert torch.equal(attention(hidden, mask, False, queries)[0], plain)
        assert nothing is None
        assert scores is not None
        assert (fused.shape, fused.dtype) == (plain.shape, plain.dtype)
        for context in (fused, plain):
            assert_rounded(context, right, 4)  # of states and weights; query, key and value; probabilities; the context


@pytest.mark.parametrize(("dtype", "level"), [(torch.float16, "O1"), (torch.bfloat16, "O2")])
def test_only_bf16_at_o1_is_packed(dtype, level):
    built = model()
    TorchMixedPrecision(CPU, dtype, level, 128.0).prepare_for_inference(built)
    assert {module.weight.dtype for module in built.modules() if isinstance(module, nn.Linear)} == {dtype}


def test_a_build_without_the_operations_goes_on_without_them(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packed_inference.can_pack()
    built = model()
    TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0).prepare_for_inference(built)
    assert any(isinstance(module, nn.Linear) for module in built.modules())


@where_packed
@torch.no_grad()
def test_packed_attention_gives_out_as_many_queries_as_asked():
    """One product makes all of query, key and value; the first tokens' context is that of all tokens' beginning."""
    built = model().bert.encoder.layer[0].attention
    hidden, mask = torch.randn(3, 7, built.self.query.in_features), torch.zeros(3, 1, 1, 7)
    right, _ = built.self(hidden, mask, True, 2)
    packed_inference._pack(built, "gelu", few_sizes=False)
    whole, all_scores = built.self(hidden, mask, True, None)
    first, scores = built.self(hidden, mask, True, 2)
    # Of states and weights; query, key and value; scores or probabilities; the context. Kernels differ with the rows.
    assert_rounded(first, whole[:, :2].float(), 4)
    assert_rounded(scores, all_scores[:, :, :2].float(), 4)
    assert_rounded(first, right, 4)
