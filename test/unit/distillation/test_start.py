"""What a start must not cost: the import of torch's compiler, which takes seconds, and weights drawn in vain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Golden, command, read_bin
from torch import nn

from data_processing.tasks import find_task
from distillation.models import load_complete, load_learner


@pytest.mark.parametrize("changes", [{}, {"pred_distill": True}, {"do_finetune": True}, {"do_eval": True}])
def test_no_run_imports_the_compiler(tmp_path: Path, changes: dict[str, object]) -> None:
    """torch's own optimizers import it, and so does drawing the weights of a model that takes no memory."""
    place = Golden("sst2_small").workplace(tmp_path)
    program = "import sys, main\nmain.main(sys.argv[1:])\nsys.exit('torch._dynamo' in sys.modules)\n"
    assert command("-c", program, *place.flags(**changes), cwd=tmp_path).status == 0


def test_weights_are_drawn_only_where_the_checkpoint_lacks_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Golden("sst2_small").workplace(tmp_path)
    task = find_task("SST-2")
    drawn = []
    draw = nn.init._no_grad_normal_

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        drawn.append(tensor.shape)
        return draw(tensor, *args, **kwargs)

    monkeypatch.setattr(nn.init, "_no_grad_normal_", counted)
    load_complete(place.teacher, task, True, None, "the teacher")
    load_learner(place.teacher, task, True)
    assert not drawn
    weights = read_bin(place.teacher)
    del weights["classifier.weight"]
    torch.save(weights, place.teacher / "pytorch_model.bin")
    learner = load_learner(place.teacher, task, True)
    assert learner.model.classifier.weight.shape in drawn
    assert 0 < learner.model.classifier.weight.std() < 0.1  # of a normal distribution, as BERT's new weights are
