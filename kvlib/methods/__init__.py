"""The methods, one file per paper; importing this package registers them."""

from kvlib.methods import (  # noqa: F401
    adakv,
    anchorcoder,
    baselines,
    loki,
    quest,
    systems,
    tidaldecode,
    tokenselect,
    uncomp,
    uncomp_controls,
    uncomp_release,
    vatp,
)
