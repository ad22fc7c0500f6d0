"""The BERT family: models, tokenizer, optimizer, weight files. Knows no task, no device, no training."""
