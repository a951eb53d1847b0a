"""Optional GPU paths. Each names the reference that it must agree with."""
