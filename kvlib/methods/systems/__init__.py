"""The systems that the four papers stand among, one small file each; importing this package registers them."""

from kvlib.methods.systems import (  # noqa: F401
    adaptive,
    combined,
    cskv,
    eigen_attention,
    int8,
    keydiff,
    kivi,
    kvsharer,
    lorc,
    minicache,
    think,
)
