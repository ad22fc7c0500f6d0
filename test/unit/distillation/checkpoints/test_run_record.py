"""run.json beside a model: the run that made it, enough to repeat it, and no secrets."""

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
from distillation.checkpoints.run_record import describe_command, flags_of, read_run, revision
from distillation.options import Options, parse_options


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(place: Workplace) -> dict[str, Any]:
    found = read_run(place.model)
    assert found is not None
    return found


def test_run_json_records_flags_machine_files_and_the_best_metric(
    sst2: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a secret of the environment")
    sst2.run(pred_distill=True, num_train_epochs=2, seed=7)
    run = record(sst2)
    assert (run["stage"], run["steps"]) == ("prediction-layer distillation", 2)
    assert (run["flags"]["seed"], run["flags"]["task_name"], run["flags"]["padding"]) == (7, "SST-2", "max_length")
    assert run["flags"].keys() >= {field.name for field in dataclasses.fields(Options)} - {"task", "stage"}
    assert run["versions"]["torch"] == torch.__version__
    assert run["machine"].items() >= {"device": "cpu", "processes": 1}.items()
    assert run["machine"]["processor"]
    assert run["machine"]["cores"] >= 1
    names = [Path(path).name for path in run["sha256"]]
    assert sorted(names) == sorted(["train.tsv", "dev.tsv", *["config.json", "vocab.txt", "pytorch_model.bin"] * 2])
    assert all(sha256(Path(path)) == digest for path, digest in run["sha256"].items())
    assert len(run["model"]) == 4
    assert all(sha256(sst2.model / name) == digest for name, digest in run["model"].items())
    assert datetime.fromisoformat(run["begun"]) <= datetime.fromisoformat(run["finished"])
    best = max(sst2.events("eval"), key=lambda event: event["acc"])
    assert run["best"] == {"metric": "acc", "value": best["acc"], "step": best["step"], "chosen_on": "dev.tsv"}
    assert "secret" not in json.dumps(run)


def test_a_stage_without_a_metric_records_none(sst2: Workplace) -> None:
    sst2.run()
    assert record(sst2)["best"] is None


def test_addresses_lose_their_credentials(sst2: Workplace) -> None:
    address = "https" + "://user:secret" + "@data.example/x.zip?sig=secret"
    options = parse_options(sst2.flags(), task_distill.ENTRY)
    options = dataclasses.replace(options, data_url=address, addresses={"data_dir": parse_address(address)})
    command = describe_command("x", {"teacher": Path("a"), "from": [address], "seed": 3, "init": None}, [sst2.teacher])
    for flags in (flags_of(options), command["flags"]):
        assert "data.example" in json.dumps(flags)
        assert "secret" not in json.dumps(flags)
    assert command["flags"].items() >= {"teacher": "a", "seed": 3, "init": None}.items()
    assert len(command["sha256"]) == 3


def test_the_revision_is_gits_or_none_where_git_gives_none() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]  # git refuses the repository of another user
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    head = git.stdout.strip()
    assert revision() in ([head, f"{head}-dirty"] if git.returncode == 0 and (ROOT / ".git").exists() else [None])
