"""The systems that the four papers stand among, one small file each; importing this package registers them."""

from kvlib.methods.systems import (  # noqa: F401
    adaptive,
    combined,
    cskv,
    eigen_attention,
    elastic_cache,
    int8,
    keydiff,
    kivi,
    kv_compress,
    kvsharer,
    kvzip,
    lorc,
    minicache,
    subgen,
    subgen_sampled,
    think,
)
