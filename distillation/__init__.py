"""How a student is taught: options, losses, teacher, the training loop, evaluation, logs."""

import os

# Before torch is imported: its threads then sleep while they wait for each other, in place of turning. Where
# other work shares the cores, turning made a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
