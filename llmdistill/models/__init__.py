"""Checkpoints, their structure, where models come from, and students. What a stage or a pipeline imports from here loads no torch."""
