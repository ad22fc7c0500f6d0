"""One module per kind of run: training, evaluation and prediction, augmentation, masked-LM head."""
