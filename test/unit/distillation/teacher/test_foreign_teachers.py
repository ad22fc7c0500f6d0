"""A BERT classifier that `transformers` saved is a teacher as it stands, and what a run makes of it, it can read.

Logits and accuracies are compared with those of `transformers` itself, its labels matched by their names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import Golden, Workplace, assert_close, edit_config, read_bin, write_rows
from glue_rows import workplace
from torch.nn import functional

from data_processing.batching import Collator
from data_processing.examples import Examples
from data_processing.features import make_features
from data_processing.tasks import find_task
from distillation.labels import in_task_order
from distillation.models import load_complete
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification

VOCABULARY = Golden("mnli_small").case["vocab"]
MNLI = ("contradiction", "entailment", "neutral")  # the task's order
SHUFFLED = ("entailment", "neutral", "contradiction")  # no two labels changed places: going back is another order
HEADER, *ROWS = Golden("mnli_small").case["rows"]
PAIRS = [row[8] for row in ROWS], [row[9] for row in ROWS]


@dataclass
class Foreign:
    """A classifier of `transformers` and the folder that it saved it in."""

    folder: Path
    model: Any
    tokenizer: Any

    @property
    def names(self) -> list[str]:
        return [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]

    def inputs(self, *texts: list[str]) -> Mapping[str, torch.Tensor]:
        length = self.model.config.max_position_embeddings
        return self.tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    def logits(self, *texts: list[str], order: Sequence[str] | None = None) -> torch.Tensor:
        """[texts, labels], where an order is given in that of the names."""
        with torch.no_grad():
            logits = self.model(**self.inputs(*texts)).logits
        return logits if order is None else logits[:, [self.names.index(name) for name in order]]


def save(folder: Path, names: Sequence[str] | int, task: str = "mnli_small", seed: int = 0, **config: Any) -> Foreign:
    """Saves a random classifier with these names for its labels, or so many without any, and its tokenizer."""
    named = {"num_labels": names} if isinstance(names, int) else {"id2label": dict(enumerate(names))}
    values = Golden(task).config("teacher") | {"num_hidden_layers": 4, "initializer_range": 0.12} | named | config
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**values)).eval()
    vocabulary = folder.with_name(f"{folder.name}_vocabulary")
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(vocabulary, do_lower_case=True)
    foreign = Foreign(folder, model, tokenizer)
    with torch.no_grad():  # so that each label is the likeliest of some text
        model.classifier.weight *= 4
        model.classifier.bias -= foreign.logits(*PAIRS).mean(dim=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)  # `transformers` 4 still wrote it
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    return foreign


def our_logits(folder: Path, task_name: str, *texts: list[str], head: str | None = None) -> torch.Tensor:
    """What the project makes of a folder and these texts, by the functions that a run calls."""
    loaded = load_complete(folder, find_task(task_name), True, head)
    features = make_features(Examples(texts, np.zeros(len(texts[0]), dtype=np.int64)), loaded.tokenizer, 64)
    batch = Collator(False, 64, loaded.tokenizer.pad_token_id).collate(features, np.arange(len(features)))
    with torch.no_grad():
        return loaded.model(batch.input_ids, batch.token_type_ids, batch.attention_mask).logits


def with_vocabulary_file(foreign: Foreign) -> None:
    (foreign.folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (foreign.folder / "tokenizer.json").unlink()


def with_pickled_weights(foreign: Foreign) -> None:
    torch.save(foreign.model.state_dict(), foreign.folder / "pytorch_model.bin")
    (foreign.folder / "model.safetensors").unlink()


def as_of_old(foreign: Foreign) -> None:
    with_pickled_weights(foreign)
    with_vocabulary_file(foreign)
    (foreign.folder / "tokenizer_config.json").unlink()


FOLDERS = {
    "as saved": lambda _: None,
    "vocab.txt": with_vocabulary_file,
    "pytorch_model.bin": with_pickled_weights,
    "pytorch_model.bin and vocab.txt": as_of_old,
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_logits_equal_those_of_transformers(tmp_path: Path, change: Any) -> None:
    """In the task's order, whatever form the folder has; the head without relu is read from the config."""
    foreign = save(tmp_path / "foreign", SHUFFLED)
    change(foreign)
    expected = foreign.logits(*PAIRS, order=MNLI)
    assert len(set(expected.argmax(dim=1).tolist())) == 3
    assert_close(our_logits(foreign.folder, "MNLI", *PAIRS), expected, atol=1e-5)


def test_the_heads_form_can_be_told_where_the_config_does_not(tmp_path: Path) -> None:
    foreign = save(tmp_path / "foreign", SHUFFLED)
    edit_config(foreign.folder, architectures=None)
    expected = foreign.logits(*PAIRS, order=MNLI)
    assert_close(our_logits(foreign.folder, "MNLI", *PAIRS, head="linear"), expected, atol=1e-5)
    assert float((our_logits(foreign.folder, "MNLI", *PAIRS) - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("MNLI", ["ENTAILMENT", "Neutral", "CONTRADICTION"]),
        ("mnli-mm", ["neutral", "contradiction", " Entailment "]),
        ("QNLI", ["not-entailment", "entailment"]),
        ("QNLI", ["NOT ENTAILMENT", "ENTAILMENT"]),
        ("RTE", ["Not_Entailment", "Entailment"]),
        ("WNLI", ["entailment", "not_entailment"]),
        ("SST-2", ["POSITIVE", "NEGATIVE"]),
        ("SST-2", ["1", "0"]),
        ("CoLA", ["acceptable", "unacceptable"]),
        ("MRPC", ["equivalent", "not-equivalent"]),
        ("QQP", ["duplicate", "not_duplicate"]),
    ],
    ids=str,
)
def test_names_are_matched_however_they_are_spelled(tmp_path: Path, task: str, names: list[str]) -> None:
    """The task's own or, of 0 and 1, what they mean in GLUE. Here each is in another place than in the task."""
    foreign = save(tmp_path / "foreign", names)
    texts = PAIRS[: len(find_task(task).text_columns)]
    expected = {
        "MNLI": [2, 0, 1],
        "mnli-mm": [1, 2, 0],
    }.get(task, [1, 0])
    assert_close(our_logits(foreign.folder, task, *texts), foreign.logits(*texts)[:, expected], atol=1e-5)


@pytest.fixture
def taught(mnli: Workplace) -> tuple[Workplace, Foreign]:
    """The golden MNLI case with a foreign teacher that is right in 7 of the 9 matched rows by name, in few by index."""
    foreign = save(mnli.folder / "foreign", SHUFFLED)
    mnli.teacher, mnli.max_seq_length = foreign.folder, 64  # no pair is cut
    logits = foreign.logits(*PAIRS)
    said = [foreign.names[number] for number in logits.argmax(dim=1)]
    labels = [*said[:7], *(MNLI[MNLI.index(name) - 1] for name in said[7:])]
    by_index = [MNLI[number] for number in logits.argmax(dim=1)]
    assert len(set(said)) == 3
    assert sum(ours == theirs for ours, theirs in zip(by_index, labels, strict=True)) < 4
    write_rows(
        mnli.data / "dev_matched.tsv", [HEADER, *([*row[:-1], name] for row, name in zip(ROWS, labels, strict=True))]
    )
    return mnli, foreign


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("pred_distill", [False, True], ids=["intermediate", "prediction"])
def test_a_teacher_is_used_as_it_was_saved(taught: tuple[Workplace, Foreign], change: Any, pred_distill: bool) -> None:
    """Its accuracies are those of `transformers` by name, and its logits are what the student learns."""
    place, foreign = taught
    change(foreign)
    words = place.run(pred_distill=pred_distill, num_train_epochs=2).out
    assert f"{foreign.folder}: its labels are in the order {', '.join(SHUFFLED)}: matched by name\n" in words
    matched, mismatched = place.events("teacher")
    logits = foreign.logits(*PAIRS, order=MNLI)
    assert matched["acc"] == pytest.approx(7 / 9)
    said = [MNLI[number] for number in logits.argmax(dim=1)]
    assert mismatched["acc"] == pytest.approx(np.mean([name == row[-1] for name, row in zip(said, ROWS, strict=True)]))
    if pred_distill:
        student = TinyBertForSequenceClassification.from_pretrained(place.student).eval()
        with torch.no_grad():
            learned = student(**foreign.inputs(*PAIRS)).logits
        loss = -(logits.softmax(dim=1) * learned.log_softmax(dim=1)).mean()
        assert place.series("cls_loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    config = json.loads((place.model / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"].values()) == list(MNLI)
    assert config["architectures"] == ["TinyBertForSequenceClassification"]  # the student's own head


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1", "LABEL_2"), ("label_0", "label_1", "label_2")], ids=str)
def test_numbered_names_are_taken_by_index_and_a_line_says_so(mnli: Workplace, names: tuple[str, ...]) -> None:
    foreign = save(mnli.folder / "foreign", names)
    words = mnli.run(do_eval=True, student_model=foreign.folder, max_seq_length=64).out
    line = f"{foreign.folder}: config.json names its labels {', '.join(names)}: taken as {', '.join(MNLI)}"
    assert f"{line}, in this order\n" in words
    logits = foreign.logits(*PAIRS)
    expected = functional.cross_entropy(logits, torch.tensor([MNLI.index(row[-1]) for row in ROWS]))
    assert mnli.events("eval")[0]["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_line_tells_of_labels_without_names(sst2: Workplace) -> None:
    """`transformers` writes none where there are two and they are its LABEL_0 and LABEL_1."""
    foreign = save(sst2.folder / "foreign", 2, "sst2_small")
    assert "id2label" not in json.loads((foreign.folder / "config.json").read_text(encoding="utf-8"))
    words = sst2.run(do_eval=True, student_model=foreign.folder, teacher_model=None).out
    assert f"{foreign.folder}: config.json names no labels: taken as negative, positive, in this order\n" in words
    assert "names no labels" not in sst2.run(do_eval=True).out  # TinyBERT's own releases, whose order is the task's


@pytest.mark.parametrize(
    "names",
    [
        ("yes", "no", "maybe"),
        ("entailment", "neutral", "LABEL_2"),
        ("LABEL_1", "LABEL_0", "LABEL_2"),
        ("entailment", "neutral", "Entailment"),
        ("entailment", "neutral", ""),
        ("contradiction", "entailment", "neutral", "none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("flags", [{}, {"pred_distill": True}, {"do_eval": True}, {"do_predict": True}], ids=str)
def test_names_that_cannot_be_matched_are_refused(mnli: Workplace, names: tuple[str, ...], flags: dict) -> None:
    """Trap 29: both lists are told, and nothing is written."""
    foreign = save(mnli.folder / "foreign", len(names[:3]))
    edit_config(foreign.folder, id2label=dict(enumerate(names)))
    role = "student_model" if "do_eval" in flags or "do_predict" in flags else "teacher_model"
    message = mnli.fails(**flags, **{role: foreign.folder})
    assert f"{foreign.folder}: config.json names the labels {', '.join(names)}; MNLI's are {', '.join(MNLI)}" in message
    assert "cannot be matched" in message


def test_names_of_another_task_are_refused_with_the_tasks_words(sst2: Workplace) -> None:
    foreign = save(sst2.folder / "foreign", ("entailment", "not_entailment"), "sst2_small")
    message = sst2.fails(teacher_model=foreign.folder)
    assert "names the labels entailment, not_entailment; SST-2's are 0, 1 (negative, positive)" in message


@pytest.mark.parametrize(("names", "expected"), [(("GOOD", "good"), [1, 0]), (("good", "Good"), None)], ids=str)
def test_labels_of_ones_own_may_differ_in_their_case_alone(
    tmp_path: Path, names: tuple[str, ...], expected: list[int] | None
) -> None:
    """Then only names that are written as the task's are matched."""
    task = dataclasses.replace(find_task("SST-2"), labels=("good", "GOOD"), meanings=())
    config = BertConfig.from_dict(Golden("sst2_small").config("teacher") | {"id2label": dict(enumerate(names))})
    weights = {"classifier.bias": torch.tensor([0.0, 1.0]), "bert.pooler.dense.bias": torch.tensor([2.0, 3.0])}
    if expected is None:
        with pytest.raises(UserError, match="names the labels good, Good; SST-2's are good, GOOD: they cannot"):
            in_task_order(weights, config, task, tmp_path)
    else:
        found = in_task_order(weights, config, task, tmp_path)
        assert found["classifier.bias"].tolist() == expected
        assert found["bert.pooler.dense.bias"].tolist() == [2, 3]


@pytest.mark.parametrize("learner", ["student", "teacher"])
def test_a_model_of_another_task_is_a_start_where_it_has_as_many_labels(sst2: Workplace, learner: str) -> None:
    """Its classifier stays as it is, and what is written names this task's labels."""
    foreign = save(sst2.folder / "foreign", ("not_entailment", "entailment"), "sst2_small", num_hidden_layers=3)
    flags = {"do_finetune": True, "learning_rate": 1e-9} if learner == "teacher" else {}
    sst2.run(**flags, **{f"{learner}_model": foreign.folder})
    assert_close(read_bin(sst2.model)["classifier.weight"], foreign.model.classifier.weight.detach(), atol=1e-6)
    config = json.loads((sst2.model / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"].values()) == ["negative", "positive"]


@pytest.mark.parametrize("names", [SHUFFLED, MNLI, 3, ("x", "y", "z")], ids=str)
@pytest.mark.parametrize("stage", ["prediction", "fine-tuning"])
def test_transformers_reads_what_a_run_makes(mnli: Workplace, stage: str, names: tuple[str, ...] | int) -> None:
    """A student or teacher with the linear head: the same logits, each under its own name, and the same tokens."""
    foreign = save(mnli.folder / "foreign", names, num_hidden_layers=2)
    role = {"teacher_model": foreign.folder, "do_finetune": True} if stage == "fine-tuning" else {}
    role = role or {"student_model": foreign.folder, "pred_distill": True}
    mnli.run(**role, learning_rate=1e-5, warmup_proportion=0, max_seq_length=64)
    read, report = transformers.AutoModelForSequenceClassification.from_pretrained(mnli.model, output_loading_info=True)
    assert not report["missing_keys"]
    theirs = Foreign(mnli.model, read.eval(), transformers.AutoTokenizer.from_pretrained(mnli.model))
    assert theirs.names == list(MNLI)
    assert read.config.label2id == {name: number for number, name in enumerate(MNLI)}
    assert_close(our_logits(mnli.model, "MNLI", *PAIRS), theirs.logits(*PAIRS), atol=1e-5)
    known = foreign.logits(*PAIRS, order=MNLI if names == SHUFFLED else None)
    moved = float((theirs.logits(*PAIRS) - known).abs().max())
    assert 1e-4 < moved < float((foreign.logits(*PAIRS)[:, [1, 2, 0]] - known).abs().max()) / 2  # by one small step


@pytest.mark.parametrize("names", [("LABEL_0",), ("similarity",), 1], ids=str)
def test_a_regressions_teacher_has_one_output_whatever_its_name(tmp_path: Path, names: tuple[str, ...] | int) -> None:
    place, rows = workplace(tmp_path, "STS-B")
    foreign = save(tmp_path / "foreign", names, max_position_embeddings=128)
    place.teacher = foreign.folder
    words = place.run(pred_distill=True, regression_target="teacher", padding="longest").out
    assert "config.json names" not in words
    texts = [row.texts for row in rows["dev.tsv"]]
    scores = foreign.logits(*map(list, zip(*texts, strict=True)))[:, 0].numpy()
    labels = [float(row.label) for row in rows["dev.tsv"]]
    assert place.events("teacher")[0]["eval_loss"] == pytest.approx(np.square(scores - labels).mean(), rel=1e-4)
    assert "RTE has 2" in place.fails(task_name="RTE", output_dir=tmp_path / "other")
