"""Which kernels compile for a GPU that is not there: `python -m benchmarks.compiled`.

Every launch that tests/kernels_compile knows of the Triton kernels, and every kernel of csrc/: compiled for sm_90 and
within its registers and shared memory. Needs no GPU, but triton and nvcc.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.runtime import driver

from benchmarks.store import ROOT
from genevolve_fast.evaluate.scoreboard import record

sys.path.insert(0, str(ROOT / "tests" / "kernels_compile"))
from test_compile import SHARED_MEMORY, Device, launches, resources  # noqa: E402

REGISTERS = 255  # of a thread


def triton_kernels(arch: int) -> dict[str, str | None]:
    """Launch -> what is wrong with it, or None."""
    driver.set_active(Device(arch))
    found: dict[str, str | None] = {}
    for kernel, args, options in launches():
        name = f"{kernel.fn.__name__} {' '.join(f'{k}={v}' for k, v in options.items())} #{len(found)}"
        try:
            compiled = kernel.warmup(*args, grid=(1,), **options)
        except Exception as e:
            found[name] = f"does not compile: {e}"
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            ((registers, stack, _),) = resources(Path(f.name)).values()
        found[name] = _fits(arch, registers, compiled.metadata.shared)
        print(f"sm_{arch} {name}: {registers} registers, {stack} bytes of stack, {compiled.metadata.shared} shared")
    return found


def csrc_kernels(arch: int) -> dict[str, str | None]:
    """Kernel -> what is wrong with it, or None. Raises FileNotFoundError without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc: csrc/ cannot be compiled")
    found: dict[str, str | None] = {}
    for source in sorted((ROOT / "csrc").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "k.cubin"
            target = f"-gencode=arch=compute_{arch}a,code=sm_{arch}a"
            command = [nvcc, "-O3", "-std=c++17", "-cubin", target, "-o", str(cubin), str(source)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                found[source.name] = f"does not compile: {made.stderr.strip()}"
                continue
            for name, (registers, stack, shared) in resources(cubin).items():
                found[f"{source.name} {name}"] = _fits(arch, registers, shared)
                print(f"sm_{arch} {source.name} {name}: {registers} registers, {stack} bytes of stack, {shared} shared")
    return found


def _fits(arch: int, registers: int, shared: int) -> str | None:
    if registers > REGISTERS or shared > SHARED_MEMORY[arch]:
        return f"does not fit: {registers} registers, {shared} bytes of shared memory"
    return None


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        found = triton_kernels(90) | csrc_kernels(90)
    except FileNotFoundError as e:
        raise SystemExit(f"{e}: nothing is recorded") from None
    for name, wrong in found.items():
        if wrong:
            print(f"{name}: {wrong}")
    share = sum(wrong is None for wrong in found.values()) / len(found)
    record("head/kernels_compiled_sm90", share, n=len(found), command="python -m benchmarks.compiled")
    if share < 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
