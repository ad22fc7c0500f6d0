"""A run starts without seconds of waste: no import of torch's compiler, no random weights that are overwritten."""

from pathlib import Path

import pytest
import torch
from cases import Workplace, command, edit_weights, read_bin

from data_processing.tasks import find_task
from distillation.models import load_complete, load_for_training

SST2 = find_task("SST-2")


@pytest.mark.parametrize("changes", [{}, {"pred_distill": True}, {"do_finetune": True}, {"do_eval": True}], ids=str)
def test_no_run_imports_the_compiler(sst2: Workplace, tmp_path: Path, changes: dict[str, object]) -> None:
    """torch's own optimizers import it, and so does initializing a model on the meta device."""
    program = "import sys, main\nmain.main(sys.argv[1:])\nsys.exit('torch._dynamo' in sys.modules)\n"
    assert command("-c", program, *sst2.flags(**changes), cwd=tmp_path).status == 0


def test_loading_a_complete_model_draws_no_random_numbers(sst2: Workplace) -> None:
    before = torch.get_rng_state()
    load_complete(sst2.teacher, SST2, True)
    load_for_training(sst2.teacher, SST2, True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_classifier_is_drawn_from_berts_normal_distribution(sst2: Workplace) -> None:
    edit_weights(sst2.teacher, lambda weights: weights.pop("classifier.weight"))
    model = load_for_training(sst2.teacher, SST2, True).model
    assert 0.01 < model.classifier.weight.std() < 0.04
    assert torch.equal(model.bert.pooler.dense.weight, read_bin(sst2.teacher)["bert.pooler.dense.weight"])
