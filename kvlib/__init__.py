"""kvlib: KV-cache compression methods that free what they evict, on decoder-only transformers models."""

from kvlib import methods  # noqa: F401  (registers them)
from kvlib.core.method import METHODS, Method, method, register
from kvlib.core.models import load
from kvlib.core.snapshot import snapshot

__all__ = ["METHODS", "Method", "load", "method", "register", "snapshot"]
