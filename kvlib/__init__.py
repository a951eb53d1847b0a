"""kvlib: KV-cache compression methods that free what they evict, on decoder-only transformers models."""

from kvlib import methods  # noqa: F401  (registers them)
from kvlib.core.method import METHODS, Evictor, Method, Reader, method, register
from kvlib.core.models import load
from kvlib.core.snapshot import snapshot
from kvlib.verified import Verified, generate_verified

__all__ = [
    "METHODS", "Evictor", "Method", "Reader", "Verified", "generate_verified", "load", "method", "register", "snapshot",
]  # fmt: skip
