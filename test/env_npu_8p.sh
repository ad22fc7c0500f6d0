#!/usr/bin/env bash
# Sourced by the 8p scripts: the environment of eight Ascend NPUs. Does nothing, silently, where no Ascend
# toolkit is installed. Variables that are set already keep their values.
source test/env_npu_1p.sh
if [ -n "${TASK_QUEUE_ENABLE:-}" ]; then
    export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}" # the NPUs talk without a list of allowed addresses
fi
