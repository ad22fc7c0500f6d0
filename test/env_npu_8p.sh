#!/usr/bin/env bash
# Sourced by the 8p scripts: sets the environment of eight Ascend NPUs. Does nothing without an Ascend toolkit.
# Variables that are already set keep their values.
source "$(dirname -- "${BASH_SOURCE[0]}")/env_npu_1p.sh"
if [ -n "${TASK_QUEUE_ENABLE:-}" ]; then
    export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}" # no list of allowed addresses
fi
