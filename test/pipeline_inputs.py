"""Command of pipeline.sh: print the inputs of a part, or nothing if the part was made from the same inputs.

    python test/pipeline_inputs.py pipeline/RTE/teacher.done [--replace] FLAGS OF task_distill.py

Inputs are digests of the data, of the models' files and of this project's code, and the settings that change the
result. The first argument is the file with the inputs of a part that is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import task_distill
from data_processing.cache import digest
from data_processing.files import file_digest
from distillation.checkpoints.run_record import (
    changed_settings,
    data_files,
    flags_of,
    model_files,
    task_settings,
)
from distillation.flags import OneLineParser
from distillation.launch import run_entry
from distillation.options import Options, parse_options
from distillation.runtime.files import read_json_object
from transformer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CODE = ("transformer", "data_processing", "distillation")


def inputs_of(options: Options) -> dict[str, Any]:
    """Return the inputs of a run in the form that `changed_settings` compares.

    Raises:
        UserError: a file cannot be read.
    """
    files = {path.name: path for path in data_files(options)}
    for flag, folder in (("--teacher_model", options.teacher_model), ("--student_model", options.student_model)):
        files |= {f"{path.name} of {flag}": path for path in (model_files(folder) if folder else ())}
    try:
        digests = {name: file_digest(path)[:32] for name, path in files.items() if path.is_file()}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    addresses = {f"the address of --{name}": address.redacted for name, address in options.addresses.items()}
    code = {"this project's code": code_digest()}
    return {
        "stage": options.stage.value,
        "flags": flags_of(options),
        "compared": {**task_settings(options.task), **digests, **addresses, **code},
    }


def code_digest() -> str:
    """Return a digest of the names and contents of the source files that a run may use."""
    files = [ROOT / "task_distill.py", *sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))]
    return digest(files={str(path.relative_to(ROOT)): file_digest(path) for path in files})


def changes(done: Path, inputs: dict[str, Any]) -> list[str]:
    """Return a phrase for each input that differs from those in the file."""
    before = read_json_object(done)
    if before is None or not all(isinstance(before.get(name), dict) for name in ("flags", "compared")):
        return [f"{done} does not name its inputs"]
    return changed_settings(before, inputs)


def main(arguments: Sequence[str]) -> None:
    """Print the inputs as JSON on one line, unless the file has the same.

    Raises:
        UserError: the file has other inputs, and there is no --replace.
    """
    parser = OneLineParser(prog="pipeline_inputs.py", allow_abbrev=False, add_help=False)
    parser.add_argument("done", type=Path)
    parser.add_argument("--replace", action="store_true")
    own, flags = parser.parse_known_args(list(arguments))
    inputs = inputs_of(parse_options(flags, task_distill.ENTRY))
    if own.done.exists():
        changed = changes(own.done, inputs)
        if not changed:
            return
        if not own.replace:
            raise UserError(
                f"{own.done.with_suffix('')} was made from other inputs: {'; '.join(changed)}. OVERWRITE_OUTPUT_DIR=1 "
                "makes it and the later parts again, another WORK_DIR keeps it"
            )
        print(f"made again, because of other inputs: {'; '.join(changed)}", file=sys.stderr)
    print(json.dumps(inputs))


if __name__ == "__main__":
    sys.exit(run_entry("pipeline.sh", main))
