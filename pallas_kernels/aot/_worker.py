"""A child process of `pallas_kernels.aot`: compiles one task after another, until a compiler takes it down.

It is run as a file, not imported, and imports nothing of the package: a worker for GPUs starts without JAX.
Tasks come pickled on standard input, replies go pickled to standard output, compilers talk on standard error.
"""

import functools
import glob
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

Task = dict[str, Any]


def main(mode: str, memory: int, parent: int) -> None:
    """`memory`: bytes beyond which a compiler's allocations fail, before they take the machine down.

    Compilers give nothing back: a process that has grown to a quarter of it ends with its reply.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    threading.Thread(target=_outlive_nobody, args=(parent,), daemon=True).start()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as dump:
        run = _compiler(mode, dump)
        while True:
            try:
                task = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                reply: Task = run(task)
            except Exception as e:
                reply = {"error": f"{type(e).__name__}: {e}"}
            reply["last"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > memory // 4
            pickle.dump(reply, replies)
            replies.flush()
            if reply["last"]:
                return


def _outlive_nobody(parent: int) -> None:
    """End with the parent, even if it was killed while a compiler is at work here."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _compiler(mode: str, dump: str) -> Callable[[Task], Task]:
    if mode == "triton":
        return functools.partial(_triton, directory=dump)
    flags = {
        "tpu": "",
        "tpu-profile": f"--xla_jf_dump_static_llo_profile_to={dump}",
        "tpu-bundles": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }[mode]
    # libtpu reads these once, as it is loaded.
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_LOG_DIR="disabled",  # a profile that aborts leaves gigabytes
        LIBTPU_INIT_ARGS=f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}",
        JAX_ENABLE_X64="1",  # programs are traced already, and arguments of 64 bits stay so
    )
    return functools.partial(_tpu, directory=dump)


def _tpu(task: Task, directory: str) -> Task:
    """Compile an exported program for one device of a topology."""
    import jax
    from jax import export
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=task["topology"]).devices[0]
    sharding = SingleDeviceSharding(device)
    exported = export.deserialize(bytearray(task["exported"]))
    operands = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals]
    compiled = jax.jit(exported.call, out_shardings=sharding).lower(*operands).compile()
    code_bytes = compiled.memory_analysis().generated_code_size_in_bytes
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        # It compiles, but an older jaxlib can't read how libtpu writes some asynchronous copies.
        return {"code_bytes": code_bytes}
    vmem = re.findall(
        r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', text
    )
    # An instruction may go over several lines; before the first stands the head of the module.
    instructions = [i for i in re.split(r"\n(?=  \S)", text)[1:] if not _FREE.search(i)]
    kernels = [i for i in instructions if "tpu_custom_call" in i]
    around = [i for i in instructions if i not in kernels]
    return {
        "code_bytes": code_bytes,
        "memory_bytes": max(map(int, vmem), default=None),
        "cycles": _cycles(kernels),
        "around_cycles": _cycles(around) if around else 0,
        "bundles": _take_bundles(directory, re.findall(r"%(\S+) = [^\n]*tpu_custom_call", text)),
    }


# Instructions for which nothing runs.
_FREE = re.compile(r" (?:parameter|constant|bitcast|tuple|get-tuple-element)\(")


def _cycles(instructions: list[str]) -> int | None:
    cycles = re.findall(r'"estimated_cycles":"?(\d+)', "\n".join(instructions))
    return sum(map(int, cycles)) if cycles else None


def _take_bundles(directory: str, kernels: list[str]) -> int | None:
    """VLIW bundles of the custom calls named `kernels`. Empties `directory`, for the next program's dump."""
    files = glob.glob(f"{glob.escape(directory)}/**", recursive=True)
    counts = []
    for path in filter(os.path.isfile, files):
        name = os.path.basename(path)
        if name.endswith("schedule-analysis_final_bundles.txt") and any(f"-{k}-" in name for k in kernels):
            with open(path) as f:
                counts += re.findall(r"total scheduled bundles:\s*(\d+)", f.read())
        os.unlink(path)
    return sum(map(int, counts)) if counts else None


def _triton(task: Task, directory: str) -> Task:
    """Compile Triton IR to a cubin, and ask it for its resources."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget

    source, cubin = os.path.join(directory, "kernel.ttir"), os.path.join(directory, "kernel.cubin")
    with open(source, "w") as f:
        f.write(task["ttir"])
    # XLA's Triton doesn't fuse products and sums by itself.
    options = {**task["options"], "enable_fp_fusion": False}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", task["compute_capability"], 32), options=options
    )
    with open(cubin, "wb") as f:
        f.write(compiled.asm["cubin"])
    cuobjdump = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    usage = subprocess.run(
        [cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "code_bytes": len(compiled.asm["cubin"]),
        "memory_bytes": compiled.metadata.shared,
        "registers": int(registers),
        "spill_bytes": int(stack),
    }


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
