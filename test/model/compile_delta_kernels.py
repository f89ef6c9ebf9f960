"""Compiles the kernels of the linear layers for a GPU that need not be there, at the paper's sizes."""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen_vla_core.model import delta_kernels
from qwen_vla_core.model.delta_op import CHANNELS, CHUNK, TOKENS, tuning

FLOAT32 = {"g", "query_factors", "key_factors", "grad_g", "grad_beta", "weight", "grad_weight"}
NUMBERS = {"length", "channels", "scale"}
RULE = {"HK": 16, "HV": 32, "DK": 128, "DV": 128, "C": CHUNK, "CHUNKS": 4, "PRECISION": "tf32"}
CONVOLUTION = {"TAPS": 4, "T": TOKENS, "N": CHANNELS}


def kind(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name == "scale":
        return "fp32"
    if name in NUMBERS or name.endswith(("_batch", "_token")):
        return "i32"
    return "*fp32" if name in FLOAT32 else "*bf16"


def compiled(name: str, warps: int, constants: dict[str, Any]) -> None:
    kernel = getattr(delta_kernels, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {argument: kind(argument, constants) for argument in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (argument, form) in enumerate(signature.items())
        if form[0] == "*" or argument == "channels" or argument.endswith(("_batch", "_token"))
    }
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    found = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    ptx = found.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": name,
                "shared": found.metadata.shared,
                "tensor_cores": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
                "wide_reads": ptx.count("ld.global.v4"),
                "machine_code": len(found.asm["cubin"]),
            }
        )
    )


if __name__ == "__main__":
    compiled("prepare", tuning.prepare_warps, RULE)
    for keep in (False, True):
        compiled("scan", tuning.scan_warps, {**RULE, "BV": tuning.scan_block, "KEEP": keep})
    compiled("scan_back", tuning.back_warps, {**RULE, "BV": tuning.back_block})
    compiled("local_back", tuning.local_warps, {**RULE, "BV": tuning.local_block})
    for name in ("convolve", "convolve_back", "convolve_input"):
        compiled(name, 4, CONVOLUTION)
