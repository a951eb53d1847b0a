"""Optional GPU paths, for CUDA builds of torch, which bring Triton. Each names the reference it must agree with.

Triton launches on the current device, whatever it is given, and the layers of a large model may lie on several: each
path makes its tensors' device the current one, but for column sums, whose caller does (`View.over_queries`).

Attributes:
    decoding: does `kvlib.kernels.decode` read packed segments and lists of slots where a decoded token would otherwise
        attend to copies of them (`kvlib.core.packed`), and `kvlib.kernels.newest` write to them? None: on a CUDA GPU
        with Triton. False: never. True: on any device; a CPU needs Triton's interpreter.
"""

from importlib.util import find_spec

TRITON = find_spec("triton") is not None
decoding: bool | None = None


def decodes(device) -> bool:
    """Does the kernel serve decoded tokens on this device?"""
    return TRITON and device.type == "cuda" if decoding is None else decoding
