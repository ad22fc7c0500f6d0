"""Text in, arrays out: tasks, examples, features, batches. Knows no training."""
