"""run.json beside a model: what made it, enough to make it again, and nothing that is nobody's business."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ROOT, Workplace

import task_distill
from data_processing.downloads.addresses import parse_address
from distillation.checkpoints.run_record import describe_command, flags_of, revision
from distillation.options import parse_options


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(place: Workplace) -> dict[str, Any]:
    return json.loads((place.model / "run.json").read_text(encoding="utf-8"))


def test_a_run_tells_what_made_its_model(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a secret of the environment")
    sst2.run(pred_distill=True, num_train_epochs=2, seed=7)
    run = record(sst2)
    assert run["stage"] == "prediction-layer distillation"
    assert (run["flags"]["seed"], run["flags"]["task_name"], run["flags"]["padding"]) == (7, "SST-2", "max_length")
    assert run["flags"].keys() >= {field.name for field in dataclasses.fields(type(parse(sst2)))} - {"task", "stage"}
    assert run["versions"]["torch"] == torch.__version__
    assert run["machine"]["device"] == "cpu"
    assert run["machine"]["processor"]
    assert run["machine"]["cores"] >= 1
    read = run["sha256"]
    names = {Path(path).name for path in read}
    assert names == {"train.tsv", "dev.tsv", "config.json", "vocab.txt", "pytorch_model.bin"}
    assert all(sha256(Path(path)) == digest for path, digest in read.items())
    assert len(read) == 2 + 2 * 3
    assert all(sha256(sst2.model / name) == digest for name, digest in run["model"].items())
    assert len(run["model"]) == 4
    assert datetime.fromisoformat(run["begun"]) <= datetime.fromisoformat(run["finished"])
    best = max(sst2.events("eval"), key=lambda event: event["acc"])
    assert run["best"] == {"metric": "acc", "value": best["acc"], "step": best["step"], "chosen_on": "dev.tsv"}
    assert run["steps"] == 2
    assert "secret" not in json.dumps(run)


def parse(place: Workplace) -> Any:
    return parse_options(place.flags(), task_distill.ENTRY)


def test_a_stage_that_chooses_by_no_metric_says_so(sst2: Workplace) -> None:
    sst2.run()
    assert record(sst2)["best"] is None


def test_addresses_lose_their_credentials(sst2: Workplace) -> None:
    scheme, rest = "https:", "//data.example/x?y"
    options = dataclasses.replace(parse(sst2), data_url=scheme + rest.replace("//", "//user:secret@"))
    assert flags_of(options)["data_url"] == f"{scheme}//…@data.example/x?…"
    signed = parse_address(f"{scheme}//data.example/x.zip?sig=secret")
    assert "secret" not in json.dumps(flags_of(dataclasses.replace(options, addresses={"data_dir": signed})))
    flags = {"teacher": Path("a"), "from": ["s3://key:secret@bucket/x"], "seed": 3, "init": None}
    told = describe_command("x", flags, [sst2.teacher])
    assert told["flags"] == {"teacher": "a", "from": ["s3://…@bucket/x"], "seed": 3, "init": None}
    assert len(told["sha256"]) == 3


def test_the_revision_is_gits() -> None:
    """None where the project came without its history."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert revision() in (head, f"{head}-dirty")
    else:
        assert revision() is None
