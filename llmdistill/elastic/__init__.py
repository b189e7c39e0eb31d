"""Elastic students: nested sub-networks of one checkpoint, run in place or taken out as small models. Settings and spaces load no torch."""
