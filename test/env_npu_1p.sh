#!/usr/bin/env bash
# Sourced by the 1p scripts: the environment of one Ascend NPU. Does nothing, silently, where no Ascend
# toolkit is installed. Variables that are set already keep their values.
for folder in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/ascend-toolkit "${HOME:-}/Ascend/ascend-toolkit"; do
    if [ -n "$folder" ] && [ -f "$folder/set_env.sh" ]; then
        set +eu # the toolkit's script is not written for them
        # shellcheck disable=SC1091  # it is there on machines with the toolkit alone
        source "$folder/set_env.sh"
        set -eu
        export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}" # the driver's log stays in its files
        export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"         # and holds errors only
        export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"                     # operators are sent to the NPU ahead
        break
    fi
done
unset folder
