"""Optional GPU paths. Each has a reference in `kvlib.attention` that it must agree with."""
