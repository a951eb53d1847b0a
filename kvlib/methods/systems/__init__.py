"""The systems that the four papers stand among, one small file each; importing this package registers them."""

from kvlib.methods.systems import (  # noqa: F401
    elastic_cache,
    int8,
    keydiff,
    kv_compress,
    kvzip,
    subgen,
    subgen_sampled,
)
