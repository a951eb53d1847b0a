"""Sweeps: a study as it is or on another model, by processes here or on a Ray cluster, in a folder of its own."""
