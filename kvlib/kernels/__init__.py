"""Optional GPU paths, for CUDA builds of torch, which bring Triton. Each names the reference that it must agree with."""
