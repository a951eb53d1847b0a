"""kvlib: KV-cache compression methods that free what they evict, on decoder-only transformers models."""

from kvlib import baselines, vatp  # noqa: F401  (register their methods)
from kvlib.models import load
from kvlib.registry import METHODS, Method, method, register
from kvlib.snapshot import snapshot

__all__ = ["METHODS", "Method", "load", "method", "register", "snapshot"]
