"""The frozen teacher and its cached outputs."""
