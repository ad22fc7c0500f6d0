"""Choose the precision of a run: fp32, or mixed precision by torch or apex, as the device allows."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

from distillation.runtime.full_precision import Precision
from distillation.runtime.mixed_precision import ApexMixedPrecision, TorchMixedPrecision
from transformer import packed_inference
from transformer.errors import UserError

logger = logging.getLogger(__name__)


def choose_precision(
    device: torch.device, amp: bool, level: str, loss_scale: float | None, dtype: str = "auto"
) -> Precision:
    """Return the precision that the flags name, or fp32, with a log line, on a CPU without bf16 instructions.

    apex is used where it is installed, the device is npu or gpu, and `dtype` is auto; otherwise torch's autocast.

    Args:
        device: the device of this process.
        amp, level, loss_scale: the flags --amp, --opt_level, --loss_scale; a loss scale of None is dynamic.
        dtype: auto, bf16 or fp16.

    Raises:
        UserError: fp16 by torch on an NPU whose overflows give no inf.
    """
    if not amp or level == "O0":
        return Precision()
    if device.type != "cpu" and dtype == "auto":
        apex = _import_apex()
        if apex is not None:
            return ApexMixedPrecision(apex, level, loss_scale)
    if device.type == "cpu" and dtype == "auto" and not cpu_has_bf16():
        logger.info("--amp: this processor has no bf16 instructions, training stays in fp32")
        return Precision()
    if device.type == "npu" and dtype != "bf16" and not _npu_computes_inf():
        raise UserError(
            "--amp: fp16 overflows give no inf on this NPU, so torch cannot detect and skip them; "
            "install Ascend's apex, or give --amp_dtype bf16"
        )
    half = {"auto": _best_half_type(device), "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return TorchMixedPrecision(device, half, level, loss_scale)


def cpu_has_bf16() -> bool:
    """Return whether torch computes matrix products in bf16 with instructions of the processor.

    oneDNN computes them, and a user may restrict its instructions (ONEDNN_MAX_CPU_ISA).
    """
    found = torch.cpu.get_capabilities()
    return packed_inference.can_pack() and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _best_half_type(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.bfloat16
    backend = getattr(torch, device.type)
    return torch.bfloat16 if backend.is_bf16_supported(including_emulation=False) else torch.float16


def _npu_computes_inf() -> bool:
    """Return whether the NPU computes with inf and NaN; those before Ascend 910B saturate instead."""
    utils = getattr(torch.npu, "utils", None)  # type: ignore[attr-defined]
    return getattr(utils, "is_support_inf_nan", lambda: True)()


def _import_apex() -> ModuleType | None:
    try:
        amp = importlib.import_module("apex.amp")
    except ImportError:
        return None
    # The package of this name on PyPI is another project.
    return amp if hasattr(amp, "initialize") and hasattr(amp, "scale_loss") else None
