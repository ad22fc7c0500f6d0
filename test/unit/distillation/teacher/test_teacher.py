"""Cached logits of the teacher: the student trains the same, and later runs read them from the cache."""

import pytest
import torch
from cases import Workplace, assert_same_weights, edit_weights, read_bin

from distillation.teacher.query import weights_digest
from distillation.teacher.teacher import Teacher
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

PREDICTION = {"pred_distill": True, "num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 3}


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """For each call of `Teacher.logits`, whether the logits were cached."""
    seen: list[bool] = []
    logits = Teacher.logits

    def noted(self, batch):
        seen.append(self.cached_logits is not None)
        return logits(self, batch)

    monkeypatch.setattr(Teacher, "logits", noted)
    return seen


@pytest.fixture
def sst2(sst2: Workplace) -> Workplace:
    """The golden case with a dev file that differs from the training file: equal files have one cache entry."""
    dev = sst2.data / "dev.tsv"
    dev.write_text("".join(dev.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    return sst2


def weights_of_run(place: Workplace, name: str, **changes) -> dict[str, torch.Tensor]:
    place.run(**{**PREDICTION, "output_dir": place.folder / name, "cache_dir": place.folder / "cache", **changes})
    return read_bin(place.folder / name)


def count_in_log(place: Workplace, text: str) -> int:
    return (place.output / "debug_layer_loss.log").read_text(encoding="utf-8").count(text)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_cached_logits_train_the_same_student(golden, tmp_path, calls, padding):
    place = golden.workplace(tmp_path)
    live = weights_of_run(place, "live", padding=padding, no_teacher_cache=True)
    assert not any(calls)
    cached = weights_of_run(place, "cached", padding=padding)
    assert len(calls) == 2 * calls.count(True) > 0
    for key, expected in live.items():
        torch.testing.assert_close(cached[key], expected, atol=2e-6, rtol=0)


def test_the_next_run_reads_the_logits_from_the_cache_and_trains_the_same_weights(sst2):
    first, second = (weights_of_run(sst2, name) for name in ("first", "second"))
    assert_same_weights(first, second)
    assert count_in_log(sst2, "computed the teacher's logits of 8 examples") == 1
    assert count_in_log(sst2, "cached by an earlier run") == 1


def test_the_teachers_result_on_dev_is_computed_once_and_logged_by_every_run(sst2):
    for number in range(2):
        sst2.run(cache_dir=sst2.folder / "cache", output_dir=sst2.folder / str(number))
    first, second = sst2.events("teacher")
    assert (first["acc"], first["eval_loss"]) == (second["acc"], second["eval_loss"])
    assert count_in_log(sst2, "the teacher's own dev.tsv: acc") == 2
    assert count_in_log(sst2, "(7 examples, cached)") == 1


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
def test_a_changed_teacher_or_text_is_computed_again(sst2, change):
    weights_of_run(sst2, "first")
    flags = change(sst2)
    weights_of_run(sst2, "second", **(flags if isinstance(flags, dict) else {}))
    assert count_in_log(sst2, "computing the teacher's logits of") == 2


@pytest.mark.parametrize(
    "changes",
    [{"num_train_epochs": 1}, {"num_train_epochs": 0.5}, {"no_teacher_cache": True}],
    ids=["one epoch", "part of one", "flag"],
)
def test_logits_that_are_read_once_are_not_cached(sst2, calls, changes):
    weights_of_run(sst2, "model", **changes)
    assert calls
    assert not any(calls)


def test_cache_limit_0_writes_no_cache(sst2):
    weights_of_run(sst2, "model", cache_limit=0)
    assert not (sst2.folder / "cache").exists()


def test_the_intermediate_stage_and_finetuning_read_no_logits(sst2, calls):
    sst2.run(num_train_epochs=2)
    sst2.run(do_finetune=True, student_model=None, output_dir=sst2.folder / "teacher2", num_train_epochs=2)
    assert calls == []


def test_the_digest_of_weights_depends_on_every_value():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    one, same, other = (TinyBertForSequenceClassification(BertConfig(vocab_size=11, **sizes)) for _ in range(3))
    same.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    with torch.no_grad():
        same.classifier.bias[0] += 1e-6
    assert weights_digest(one) != weights_digest(same)
