"""The teacher that is asked once: what it says is the same, whoever asks, and it is not asked again."""

import pytest
import torch
from cases import Workplace, assert_same_weights, edit_weights, read_bin

from distillation.teacher.teacher import Teacher, weights_digest
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

PREDICTION = {"pred_distill": True, "num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 3}


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    """For each time that a training step asks for logits, whether they were remembered."""
    seen: list[bool] = []
    logits = Teacher.logits

    def noted(self, batch):
        seen.append(self.remembered is not None)
        return logits(self, batch)

    monkeypatch.setattr(Teacher, "logits", noted)
    return seen


@pytest.fixture
def sst2(sst2: Workplace) -> Workplace:
    """The golden case with a dev file of its own: what is said of equal files is remembered as one."""
    dev = sst2.data / "dev.tsv"
    dev.write_text("".join(dev.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    return sst2


def weights_of_run(place: Workplace, name: str, **changes) -> dict[str, torch.Tensor]:
    place.run(**{**PREDICTION, "output_dir": place.folder / name, "cache_dir": place.folder / "cache", **changes})
    return read_bin(place.folder / name)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_a_student_learns_the_same_from_a_teacher_that_is_asked_once(golden, tmp_path, asked, padding):
    place = golden.workplace(tmp_path)
    always = weights_of_run(place, "always", padding=padding, no_teacher_cache=True)
    assert not any(asked)
    once = weights_of_run(place, "once", padding=padding)
    assert len(asked) == 2 * asked.count(True) > 0
    for key, expected in always.items():
        torch.testing.assert_close(once[key], expected, atol=2e-6, rtol=0)


def test_the_next_run_finds_the_answers_and_learns_the_same_to_the_bit(sst2):
    first, second = (weights_of_run(sst2, name) for name in ("first", "second"))
    assert_same_weights(first, second)
    sst2.run(**PREDICTION, cache_dir=sst2.folder / "cache")
    words = (sst2.output / "debug_layer_loss.log").read_text(encoding="utf-8")
    assert words.count("the teacher was asked about 8 examples") == 1
    assert words.count("are remembered from an earlier run") == 2


def test_what_the_teacher_reaches_on_dev_is_asked_once_and_told_by_every_run(sst2):
    for number in range(2):
        sst2.run(cache_dir=sst2.folder / "cache", output_dir=sst2.folder / str(number))
    told = sst2.events("teacher")
    assert len(told) == 2
    assert told[0]["acc"] == told[1]["acc"]
    assert told[0]["eval_loss"] == told[1]["eval_loss"]
    words = (sst2.output / "debug_layer_loss.log").read_text(encoding="utf-8")
    assert words.count("the teacher's own dev.tsv: acc") == 2
    assert words.count("(7 examples, remembered)") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda place: edit_weights(place.teacher, lambda weights: weights["classifier.bias"].add_(0.1)),
        lambda place: (place.data / "train.tsv").write_text("sentence\tlabel\na film\t1\nno film\t0\nfun\t1\nx\t0\n"),
        lambda place: {"teacher_head": "linear"},
        lambda place: {"max_seq_length": 8},
        lambda place: {"eval_batch_size": 2},
    ],
    ids=["weights", "text", "head", "length", "batch"],
)
def test_another_teacher_or_other_text_is_asked_anew(sst2, change):
    weights_of_run(sst2, "first")
    flags = change(sst2)
    weights_of_run(sst2, "second", **(flags if isinstance(flags, dict) else {}))
    words = (sst2.output / "debug_layer_loss.log").read_text(encoding="utf-8")
    assert words.count("the teacher was asked about") == 2


@pytest.mark.parametrize(
    "changes",
    [{"num_train_epochs": 1}, {"num_train_epochs": 0.5}, {"no_teacher_cache": True}],
    ids=["one epoch", "part of one", "always"],
)
def test_a_teacher_that_is_met_once_is_not_asked_beforehand(sst2, asked, changes):
    weights_of_run(sst2, "model", **changes)
    assert asked
    assert not any(asked)


def test_nothing_is_kept_where_that_is_asked_for(sst2):
    weights_of_run(sst2, "model", cache_limit=0)
    assert not (sst2.folder / "cache").exists()


def test_the_intermediate_stage_and_finetuning_ask_nobody_beforehand(sst2, asked):
    sst2.run(num_train_epochs=2)
    sst2.run(do_finetune=True, student_model=None, output_dir=sst2.folder / "teacher2", num_train_epochs=2)
    assert asked == []


def test_a_digest_tells_weights_apart():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    one, same, other = (TinyBertForSequenceClassification(BertConfig(vocab_size=11, **sizes)) for _ in range(3))
    same.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    with torch.no_grad():
        same.classifier.bias[0] += 1e-6
    assert weights_digest(one) != weights_digest(same)
