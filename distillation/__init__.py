"""Train a student: options, losses, teacher, the training loop, evaluation, logs."""

import os

# Before torch is imported: its threads then sleep while they wait for each other and do not spin. Where other work
# shares the cores, spinning made a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
