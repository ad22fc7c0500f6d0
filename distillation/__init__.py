"""How a student is taught: options, losses, teacher, the training loop, evaluation, logs."""
