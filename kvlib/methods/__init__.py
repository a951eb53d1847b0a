"""The methods, one file per paper; importing this package registers them."""

from kvlib.methods import baselines, loki, quest, tidaldecode, tokenselect, uncomp, vatp  # noqa: F401
