"""The machine: devices, precision, signals, worker processes, logs."""
