"""Measurements of time, which depend on the machine: `make bench`."""
