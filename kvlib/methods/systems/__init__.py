"""The systems that the four papers stand among, one small file each; importing this package registers them."""

from kvlib.methods.systems import (  # noqa: F401
    corm,
    critical_kv,
    defensive_kv,
    expected_attention,
    int8,
    keydiff,
    keyformer,
    lagkv,
    zipvl,
)
