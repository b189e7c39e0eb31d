"""Stage, artefact, store, run, pipeline: what everything else stands on. No torch here."""
