"""Optional GPU paths, for CUDA builds of torch, which bring Triton. Each names the reference it must agree with."""
