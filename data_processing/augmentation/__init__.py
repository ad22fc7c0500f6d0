"""Data augmentation: replacements, masked words, word vectors, the resumable output file."""
