"""Compile the kernels of column sums for a GPU, which need not be there, and print how many bytes they spill.

Run as a script: where tests run, kernels are interpreted, which takes some things that the compiler does not.
"""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource

from kvlib.kernels import column_sums as kernel

TYPES = {"PARTIAL": "*fp32", "L": "*fp32", "S": "*fp32", "scale": "fp32"}
ALIGNED = "Q", "K", "PARTIAL", "L", "S", "q_row", "q_head", "q_stride", "k_row", "k_head", "k_stride", "new"


def spilled(function, dtype: str, dim: int, tiling: kernel.Tiling, positions: bool) -> int:
    sizes = {"DIM": dim, "PAD": triton.next_power_of_2(dim), "KEPT": tiling.kept, "BLOCK": tiling.block}
    constants = sizes if positions else sizes | {"QP": None, "KP": None}
    types = (
        TYPES | {"Q": f"*{dtype}", "K": f"*{dtype}", "QP": "*i32", "KP": "*i32"} | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in ALIGNED}
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(driver.__file__).parent / "bin" / "cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


if __name__ == "__main__":
    cases = ("bf16", 64, kernel.HALF), ("bf16", 128, kernel.HALF), ("fp32", 64, kernel.SINGLE)
    for function, case, positions in product((kernel._norms, kernel._sums), cases, (False, True)):
        print(spilled(function, *case, positions))
