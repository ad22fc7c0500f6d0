"""Text in, arrays out: tasks, features, batches. Knows no training."""
