#!/usr/bin/env bash
# Tests README's command for several machines: two network namespaces, connected by a veth pair, each with one process
# of the run. The weights must equal those of two processes on one machine. Needs root and iproute2.
#
#   bash test/two_machines.sh          # with a tiny generated case
#
# DATA_DIR, TEACHER_MODEL, STUDENT_MODEL for your own data and models; MAX_SEQ_LENGTH, EPOCHS.
set -euo pipefail
source "$(dirname "$0")/common.sh"

if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null; then
    echo "two_machines.sh: needs root and the command ip (Debian: apt-get install iproute2)" >&2
    exit 2
fi

work=$(mktemp -d)
first=tinybert-1-$$ second=tinybert-2-$$
processes=()
trap 'kill ${processes[@]+"${processes[@]}"} 2>/dev/null || true; ip netns del "$first" 2>/dev/null || true; ip netns del "$second" 2>/dev/null || true; rm -rf "$work"' EXIT

if [ -z "${DATA_DIR:-}" ]; then
    "$PYTHON" "${root}test/unit/tiny_case.py" "$work/case"
fi

ip netns add "$first"
ip netns add "$second"
ip link add cable0 netns "$first" type veth peer name cable1 netns "$second"
ip -n "$first" addr add 10.77.0.1/24 dev cable0
ip -n "$second" addr add 10.77.0.2/24 dev cable1
for machine in "$first" "$second"; do ip -n "$machine" link set lo up; done
ip -n "$first" link set cable0 up
ip -n "$second" link set cable1 up

flags=("${root}main.py"
    --task_name SST-2
    --data_dir "${DATA_DIR:-$work/case/data}"
    --teacher_model "${TEACHER_MODEL:-$work/case/teacher}"
    --student_model "${STUDENT_MODEL:-$work/case/student}"
    --max_seq_length "${MAX_SEQ_LENGTH:-16}"
    --num_train_epochs "${EPOCHS:-5}" --train_batch_size 5
    --fps_acc_dir "$work/output" --device cpu "${switches[@]}")
export OMP_NUM_THREADS=1

# README's command, with --node_rank of each machine. GLOO_SOCKET_IFNAME is the network device.
for rank in 0 1; do
    machine=$first
    if [ "$rank" = 1 ]; then machine=$second; fi
    ip netns exec "$machine" env GLOO_SOCKET_IFNAME="cable$rank" TORCH_CPP_LOG_LEVEL=ERROR \
        "$PYTHON" -m torch.distributed.run --nnodes 2 --node_rank "$rank" --nproc_per_node 1 \
        --master_addr 10.77.0.1 --master_port 12000 \
        "${flags[@]}" --output_dir "$work/two_machines" &
    processes[rank]=$!
done
wait "${processes[0]}"
wait "${processes[1]}"

"$PYTHON" "${flags[@]}" --device_list 0,1 --output_dir "$work/one_machine"

"$PYTHON" - "$work/two_machines" "$work/one_machine" <<'END'
import sys
import torch

two, one = (torch.load(f"{folder}/pytorch_model.bin", weights_only=True) for folder in sys.argv[1:])
difference = max(float((two[key] - one[key]).abs().max()) for key in one)
print(f"two machines and two processes on one: the largest difference of a weight is {difference:g}")
sys.exit(difference > 1e-6)
END
