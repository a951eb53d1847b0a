"""Tests run offline, on one thread per worker, with the same random examples each time."""

import os

os.environ["MPLBACKEND"] = "agg"  # for figures drawn in this process; `notebooks.run` removes it for notebooks
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: workers, and what they start, share the cores

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: they run on the CPU, slowly

# Timings vary too much on shared machines for deadlines. Examples follow from the test alone, so that a failure in one
# place is a failure everywhere; the deep tier sets its own numbers of examples.
hypothesis.settings.register_profile("kvlib", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("kvlib")
