"""The training loop, the stages and their losses."""
