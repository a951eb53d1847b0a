"""The methods, one file per paper; importing this package registers them."""

from kvlib.methods import baselines, vatp  # noqa: F401
