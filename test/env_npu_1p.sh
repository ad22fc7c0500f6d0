#!/usr/bin/env bash
# Sourced by the 1p scripts: sets the environment of one Ascend NPU. Does nothing without an Ascend toolkit.
# Variables that are already set keep their values.
for folder in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/ascend-toolkit "${HOME:-}/Ascend/ascend-toolkit"; do
    if [ -n "$folder" ] && [ -f "$folder/set_env.sh" ]; then
        set +eu # the toolkit's script does not work with them
        # shellcheck disable=SC1091  # exists only with the toolkit
        source "$folder/set_env.sh"
        set -eu
        export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}" # write the driver's log to its files
        export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"         # log errors only
        export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"                     # queue operators for the NPU
        break
    fi
done
unset folder
