"""Compression methods: each a dataclass of settings, and the mathematics that changes a model in place."""
