#!/usr/bin/env bash
# Runs the tests as on other machines, each time with a short run of each stage: the numerical tests with each
# instruction set that the processor has and with other threads; the tests of files in another locale and time zone, and
# as a user who is not root.
# Ends with a table. Needs the environment that run_tests.sh sets up. Flags go to pytest:
#     bash test/other_machines.sh -k losses
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
unit=test/unit
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
flags=("$@")

stages=( # a teacher, both distillation stages, evaluation, the demo; augmentation
    $unit/scripts/test_scripts.py::test_the_1p_scripts_run_from_teacher_to_demo_and_each_writes_its_log
    $unit/distillation/runs/test_augmentation_command.py::test_the_command_runs_as_a_script_and_as_a_module
)
numbers=( # what depends on instructions and on the order of sums
    $unit/transformer/test_{modeling,packed_inference,optimization,sparse_gradients}.py
    $unit/distillation/training $unit/distillation/runs/test_{golden_training,masked_lm,evaluation,augmentation_memory}.py
    $unit/distillation/runtime/test_{precision,apex}.py $unit/distillation/teacher/test_{teacher,foreign_teachers}.py
    $unit/distillation/runtime/test_devices.py::test_a_run_on_an_accelerator_gives_the_weights_of_one_on_a_cpu
    $unit/data_processing/augmentation $unit/data_processing/test_metrics.py
)
files=( # what depends on a locale, a time zone or a user's rights
    $unit/data_processing/test_{tables,task_files,tasks,cache}.py $unit/transformer/test_{tokenization,vocabulary}.py
    $unit/transformer/test_{saved_files,weight_files}.py $unit/distillation/checkpoints/test_{killed_runs,run_record}.py
    $unit/distillation/runs/test_{task_distill,bad_input}.py $unit/distillation/runtime/test_{logs,run_logs}.py
    $unit/distillation/teacher/test_cached_states.py::test_a_full_disk_gives_one_warning
)

run_setting() { # number, name, then the command (env … or setpriv …) under which the tests run; results into $work
    local folder="$work/$1" name="$2" begin=$SECONDS
    shift 2
    mkdir -m 777 "$folder"
    echo "$name" >"$folder/name"
    local tests=("${stages[@]}" "${numbers[@]}")
    if [[ " $* " == *" files=1 "* ]]; then tests=("${stages[@]}" "${files[@]}"); fi
    "$@" HOME="$folder" TMPDIR="$folder" PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -p no:xdist -p no:cacheprovider \
        --junitxml "$folder/results.xml" "${tests[@]}" ${flags[@]+"${flags[@]}"} >"$folder/log" 2>&1 || true
    echo "$((SECONDS - begin))" >"$folder/seconds"
}

# Each line: a name, a tab, and the variables that hold torch's libraries back to this instruction set. The highest that
# the processor has is the setting "as it is".
instruction_sets() {
    "$python" - <<'EOF'
import torch

has = torch.cpu.get_capabilities()
levels = [("AVX2", "avx2"), ("AVX512_CORE", "avx512_vl"), ("AVX512_CORE_BF16", "avx512_bf16"), ("AVX512_CORE_AMX", "amx_bf16")]
for level, _ in [(level, name) for level, name in levels if has.get(name, False)][:-1]:
    also = "ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2" if level == "AVX2" else ""
    print(f"{level}\tONEDNN_MAX_CPU_ISA={level} {also}")
EOF
}

# A user who is not root, who may read the repository and the interpreter wherever they lie, and write in neither.
reading="-all,+dac_read_search"
nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups "--inh-caps=$reading" "--ambient-caps=$reading" "--bounding-set=$reading")

settings=("as it is"$'\t'"A=" "3 threads"$'\t'"OMP_NUM_THREADS=3")
while IFS= read -r line; do settings+=("$line"); done < <(instruction_sets)
settings+=("LANG=C"$'\t'"LANG=C LC_ALL=C files=1" "TZ=Pacific/Kiritimati"$'\t'"TZ=Pacific/Kiritimati files=1")
if [ "$(id -u)" = 0 ]; then settings+=("not root"$'\t'"files=1"); fi

number=0
for setting in "${settings[@]}"; do
    echo "${setting/$'\t'/: }"
    read -ra variables <<<"${setting#*$'\t'}"
    as=(env)
    if [ "${setting%%$'\t'*}" = "not root" ]; then as=("${nobody[@]}" env); fi
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done # a process for each core
    number=$((number + 1))
    run_setting "$number" "${setting%%$'\t'*}" "${as[@]}" "${variables[@]}" &
done
wait

"$python" - "$work" <<'EOF'
import sys
from pathlib import Path
from xml.etree import ElementTree

folders = sorted((path.parent for path in Path(sys.argv[1]).glob("*/name")), key=lambda folder: int(folder.name))
processor = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
rows, bad = [], []
for folder in folders:
    name, seconds = ((folder / file).read_text().strip() for file in ("name", "seconds"))
    results = folder / "results.xml"
    suite = ElementTree.parse(results).find("testsuite").attrib if results.exists() else {"tests": 0, "errors": 1}
    failed = int(suite.get("failures", 0)) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite.get("skipped", 0))
    rows.append((name, passed, failed, seconds))
    if failed or passed <= 0:  # pytest runs nothing where it does not find one of the tests
        bad.append(folder)
for folder in bad:
    print(f"== {(folder / 'name').read_text().strip()}\n{(folder / 'log').read_text()}")
lacking = {line for folder in folders for line in (folder / "log").read_text().splitlines() if line.startswith("this machine")}
print(*sorted(lacking), f"\n{processor}", sep="\n")
print("setting                   passed  failed  seconds")
for name, passed, failed, seconds in rows:
    print(f"{name:24} {passed:7} {failed:7} {seconds:>8}")
sys.exit(bool(bad))
EOF
