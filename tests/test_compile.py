"""Every kernel of the library goes through the vendors' compilers, at shapes that take every path."""

import dataclasses
import itertools
import json
from functools import partial
from typing import Any

import jax
import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import aot, cli
from pallas_kernels.gpu import _depthwise_conv_triton as baseline
from pallas_kernels.operators import operators

KERNELS = {
    "basis_conversion": {"basis_conversion"},
    "blast_matmul": {"blast_matmul", "blast_matmul_gradients"},
    "depthwise_conv": {
        "depthwise_conv",
        "depthwise_conv_input_gradient",
        "depthwise_conv_weight_gradient",
    },
    "fft_conv": {
        "fft_conv",
        "fft_conv_gated",
        "fft_conv_gradients",
        "fft_conv_gradients_gated",
        "fft_conv_outer",
        "fft_conv_outer_back",
    },
    "low_rank_matmul": {"monarch_matmul", "monarch_matmul_gradients"},
    "mod_matmul": {"mod_matmul"},
    "modular": {"modular_mul_add"},
    "monarch_matmul": {"monarch_matmul", "monarch_matmul_gradients"},
    "ntt": {"intt", "ntt"},
}
# On a GPU products of blocks are cuBLAS's, unless somebody asks for a kernel; v4 multiplies no int8.
ON_GPU = {
    "blast_matmul": {"blast_mix", "blast_mix_gradient"},
    "low_rank_matmul": set[str](),
    "monarch_matmul": set[str](),
}
ON_V4 = {name: set[str]() for name in ("basis_conversion", "mod_matmul", "ntt")}


# The oldest and the newest generations besides, where what they lack or changed matters.
CALLS = [
    *itertools.product(operators(), ("v5e", "sm_80")),
    ("depthwise_conv", "v4"),
    ("fft_conv", "v4"),
    ("mod_matmul", "v4"),
    ("depthwise_conv", "sm_100"),
    ("blast_matmul", "sm_90"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), CALLS)
def test_every_kernel_compiles(name: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    # One compiler for each of pytest's workers, of which there is one a core. Estimates take three times as long.
    flags = ["--noestimate", "--workers", "1", "--json"]
    assert cli.main(["compile", name, "--target", target, *flags]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert {r["target"] for r in reports} == {target}
    kernels = [k for r in reports for k in r["kernels"]]
    special = ON_V4 if target == "v4" else ON_GPU if target.startswith("sm_") else {}
    assert {k["name"] for k in kernels} == {**KERNELS, **special}[name]
    for kernel in kernels:
        assert not kernel["spill_bytes"]
        assert kernel["memory_bytes"] is None or kernel["memory_bytes"] <= kernel["memory_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_kernel_that_somebody_asks_for_compiles(target: str) -> None:
    operator = operators()["monarch_matmul"]
    asked = dataclasses.replace(operator, function=partial(operator.function, implementation="pallas"))
    jobs = [
        job
        for case in operator.compile_cases(False)
        for job in cli._jobs(asked, case, [target], rivals=False)
    ]
    reports = list(aot.compile_many(jobs, workers=1, estimate=False))
    assert {k.name for r in reports for k in r.kernels} == KERNELS["monarch_matmul"]
    assert not any(r.error or k.error or k.spill_bytes for r in reports for k in r.kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "blocks, p, q, rank, dtype, target",
    [
        (16, 128, 128, 1280, "bfloat16", "7x"),
        (1, 4096, 4096, 2048, "bfloat16", "v5e"),
        (4, 512, 512, 2048, "float32", "v5e"),
        (16, 256, 688, 1488, "bfloat16", "v4"),
    ],
    ids=["512 tokens", "a large block", "split into parts", "what mixes many ranks"],
)
def test_vmem_holds_what_the_compiler_adds(
    blocks: int, p: int, q: int, rank: int, dtype: str, target: str
) -> None:
    """Each took up to 20 MB more VMEM than there is."""
    shapes = (1024, blocks * p), (blocks, rank, q), (blocks, blocks, rank), (blocks, rank, p)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    report = aot.compile(operators()["blast_matmul"].function, *args, target=target, estimate=False)
    assert report.compiled, report.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, shapes",
    [
        ("monarch_matmul", [(16, 1024, 256), (16, 1024, 256)]),
        ("blast_matmul", [(16, 128, 256), (16, 16, 128), (16, 128, 256)]),
    ],
)
def test_vmem_holds_the_parts_that_float32_is_split_into(
    operator: str, shapes: list[tuple[int, ...]]
) -> None:
    """Gradients of layers of 4096 features took more VMEM than v4 has."""
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1024, 4096), *shapes)]
    gradients = jax.grad(lambda *args: operators()[operator].function(*args).sum(), range(len(args)))
    report = aot.compile(gradients, *args, target="v4", estimate=False)
    assert report.compiled, report.error


@pytest.mark.parametrize(
    "kernel, sizes", [(baseline.correlate, {"flipped": True}), (baseline.correlate_gradient, {"rows": 448})]
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_the_triton_baseline_compiles(kernel: Any, sizes: dict[str, int]) -> None:
    sizes = sizes | {"height": 56, "width": 56, "channels": 96, "kernel_height": 13, "kernel_width": 13}
    sizes |= {"block_w": baseline.COLUMNS, "block_c": 64}
    jitted = baseline.jit(kernel)
    signature = {name: "constexpr" if name in sizes else "*fp32" for name in jitted.arg_names}
    constants = {(jitted.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(jitted, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
