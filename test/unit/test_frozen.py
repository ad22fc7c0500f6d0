"""Models that are asked only, with their linear layers in a CPU's own layout: the same numbers, faster."""

import copy

import pytest
import torch
from torch import nn

from distillation import precision
from distillation.precision import TorchMixedPrecision
from transformer import frozen
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not precision.cpu_has_bf16(), reason="this processor has no bf16 instructions")


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


@needs_bf16
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "tanh"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (8, 16)])
def test_packed_layers_say_what_the_plain_ones_say(hidden_act, batch, length, monkeypatch):
    """Both in bf16; a fused activation rounds once less."""
    assert frozen.can_pack()
    mixed = TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0)
    exact = model(hidden_act)
    packed, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    mixed.prepare_frozen(packed)
    monkeypatch.setattr(precision.frozen, "can_pack", lambda: False)
    mixed.prepare_frozen(plain)
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    assert sum(isinstance(module, nn.Linear) for module in plain.modules()) == 2 * 6 + 2
    ours, theirs = asked(packed, batch, length), asked(plain, batch, length)
    truth = asked(exact, batch, length, amp=False)
    for one, other, right in zip(
        (ours.logits, *ours.hidden_states, *ours.attention_scores),
        (theirs.logits, *theirs.hidden_states, *theirs.attention_scores),
        (truth.logits, *truth.hidden_states, *truth.attention_scores),
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        scale = right.float().abs().max()
        assert (one.float() - other.float()).abs().max() <= 0.03 * scale
        assert (one.float() - right).norm() <= 1.2 * (other.float() - right).norm() + 0.005 * right.norm()


@needs_bf16
@torch.no_grad()
def test_the_activation_is_applied_once():
    """Told against fp32, where gelu of gelu would be far off."""
    linear = nn.Linear(32, 48)
    states = torch.randn(4, 7, 32)
    right = nn.functional.gelu(linear(states))
    ours = frozen.PackedLinear(linear, "gelu")(states)
    tanh = frozen.PackedLinear(linear, "gelu_new")(states)
    plain = frozen.PackedLinear(linear)(states)
    assert ours.shape == right.shape
    assert (ours - right).abs().max() < 0.02
    assert (tanh - nn.functional.gelu(linear(states), approximate="tanh")).abs().max() < 0.02
    assert (plain - linear(states)).abs().max() < 0.02


@pytest.mark.parametrize(("dtype", "level"), [(torch.float16, "O1"), (torch.bfloat16, "O2")])
def test_only_bf16_at_o1_is_packed(dtype, level):
    built = model()
    TorchMixedPrecision(CPU, dtype, level, 128.0).prepare_frozen(built)
    assert {module.weight.dtype for module in built.modules() if isinstance(module, nn.Linear)} == {dtype}


def test_a_build_without_the_operations_goes_on_without_them(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not frozen.can_pack()
    built = model()
    TorchMixedPrecision(CPU, torch.bfloat16, "O1", 128.0).prepare_frozen(built)
    assert any(isinstance(module, nn.Linear) for module in built.modules())
