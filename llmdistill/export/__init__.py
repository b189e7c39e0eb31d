"""Checkpoints and rationales in the formats of other programs."""
