"""The methods, one file per paper; importing this package registers them."""

from kvlib.methods import baselines, tidaldecode, vatp  # noqa: F401
