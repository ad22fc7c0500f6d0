"""Command: make a new student, with random weights or with some of a teacher's layers.

    python -m distillation.new_student --teacher DIR --num_hidden_layers 4 --hidden_size 312 \
        --intermediate_size 1200 --init random|teacher_layers --output_dir general_tinybert

Use it if you have no generally distilled student (general_tinybert). It does not train the student.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distillation.checkpoints.outputs import check_output_dir, save_model
from distillation.checkpoints.run_record import describe_command, write_run
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from distillation.options import check_seed, parse_layer_map
from distillation.runtime.device import seed_process
from distillation.training.losses import choose_layer_map
from transformer.configuration import LINEAR_HEAD_ARCHITECTURE, RELU_HEAD_ARCHITECTURE, BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights
from transformer.heads import TinyBertForSequenceClassification
from transformer.loading import num_labels_of, with_encoder_prefix
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


def build_student(
    config: BertConfig,
    teacher_config: BertConfig,
    teacher: dict[str, Tensor],
    layer_map: str | tuple[int, ...] | None,
) -> tuple[TinyBertForSequenceClassification, list[str]]:
    """Build a student and, with a layer map, copy the teacher's mapped layers into it.

    Student layer m gets teacher layer g(m) of the map; embeddings, pooler and classifier are copied too. A
    module is copied if all its tensors have the student's shapes. The projection of a student with the teacher's hidden
    size starts as the identity.

    Args:
        config: the student's configuration.
        teacher_config: the teacher's configuration.
        teacher: the teacher's weights.
        layer_map: as for `choose_layer_map`; None: nothing is copied.

    Returns:
        The student, and the names of the copied modules, in the student's order.

    Raises:
        UserError: the layer map does not fit the two models, or no module has the same shapes in both.
    """
    student = TinyBertForSequenceClassification(
        config, num_labels_of(teacher) or 2, fit_size=teacher_config.hidden_size
    )
    if layer_map is None:
        return student, []
    layers = choose_layer_map(layer_map, config.num_hidden_layers, teacher_config.num_hidden_layers)
    sources = {"bert.embeddings": "bert.embeddings"}
    for ours, theirs in enumerate(layers):
        sources[f"bert.encoder.layer.{ours}"] = f"bert.encoder.layer.{theirs - 1}"
    sources |= {"bert.pooler": "bert.pooler", "classifier": "classifier"}
    copied = []
    for name, source in sources.items():
        if _copy_module(student.get_submodule(name), source, teacher):
            copied.append(source if source == name else f"{source} as {name}")
    if not copied:
        raise UserError(
            "--init teacher_layers: nothing can be copied, no module has the teacher's shapes; give the student "
            f"--hidden_size {teacher_config.hidden_size} --intermediate_size {teacher_config.intermediate_size}, "
            "or use --init random"
        )
    if config.hidden_size == teacher_config.hidden_size:
        nn.init.eye_(student.fit_dense.weight)
    return student, copied


def _copy_module(module: nn.Module, source: str, teacher: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    theirs = {key: teacher.get(f"{source}.{key}") for key in own}
    if any(tensor is None or tensor.shape != own[key].shape for key, tensor in theirs.items()):
        return False
    with torch.no_grad():
        for key, tensor in theirs.items():
            own[key].copy_(tensor)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="distillation.new_student", description="Make a new student.", allow_abbrev=False)
    add = parser.add_argument
    add("--teacher", type=path, required=True, help="folder of the model whose vocabulary and settings are used")
    add("--num_hidden_layers", type=int, default=4)
    add("--hidden_size", type=int, default=312)
    add("--intermediate_size", type=int, default=1200)
    add("--num_attention_heads", type=int, help="default: the teacher's")
    add("--init", choices=("random", "teacher_layers"), default="random")
    add("--layer_map", default="uniform", help="the teacher's layers to copy: as 2,3,5,6; or uniform, top, bottom")
    add("--seed", type=int, default=42)
    add("--output_dir", type=path, required=True)
    add("--overwrite_output_dir", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Make the student that the flags describe, and write its folder."""
    flags = _parser().parse_args(list(arguments))
    check_output_dir(flags.output_dir, flags.overwrite_output_dir, (flags.teacher,))
    if not flags.teacher.is_dir():
        raise UserError(f"{flags.teacher}: no such folder; --teacher is a model's folder")
    check_seed(flags.seed)
    teacher_config = BertConfig.from_pretrained(flags.teacher)
    tokenizer = BertTokenizer.from_pretrained(flags.teacher)
    teacher = with_encoder_prefix(read_weights(flags.teacher))
    heads = teacher_config.num_attention_heads if flags.num_attention_heads is None else flags.num_attention_heads
    config = replace(
        teacher_config,
        num_hidden_layers=flags.num_hidden_layers,
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_attention_heads=heads,
        architectures=[RELU_HEAD_ARCHITECTURE if teacher_config.relu_head else LINEAR_HEAD_ARCHITECTURE],
        extra={},
        source="the new student",
    )
    seed_process(flags.seed, 0)
    layer_map = parse_layer_map(flags.layer_map) if flags.init == "teacher_layers" else None
    student, copied = build_student(config, teacher_config, teacher, layer_map)
    weights = student.state_dict()
    if num_labels_of(teacher) is None:  # the task is not known yet; training adds its classifier
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("classifier.")}
    model = save_model(flags.output_dir, student.config, weights, tokenizer)
    write_run(flags.output_dir, describe_command("distillation.new_student", vars(flags), [flags.teacher]), model)
    if flags.init == "teacher_layers":
        logger.info("copied from the teacher: %s", ", ".join(copied))
    sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    message = "%s: %d layers, hidden %d, intermediate %d, %.1f million parameters"
    logger.info(message, flags.output_dir, *sizes, millions)


if __name__ == "__main__":
    sys.exit(run_entry("distillation.new_student", main))
