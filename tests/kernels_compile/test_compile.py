"""Every Triton kernel compiled ahead of time for sm_80 and sm_90, and csrc/ by nvcc where there is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from genevolve_fast.kernels import logprob_epilogue as epilogue  # noqa: E402

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have; otherwise only checked at launch


class Device:
    """A driver that says which GPU is there, so that real launch arguments decide the specialisation."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the JIT caches per device id

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return kind


def launches():
    products, targets = torch.zeros(8, 151936), torch.zeros(8, dtype=torch.int64)
    x, bias = torch.zeros(8), torch.zeros(151936, dtype=torch.bfloat16)
    for rich in (False, True):
        shared = dict(HAS_BIAS=rich, HAS_SOFTCAP=rich, PER_ROW=rich, BLOCK=4096, num_warps=8)
        b, tau = (bias, x) if rich else (products, x[0])
        yield epilogue._softmax, (products, b, targets, tau, x, x, x, x, 151936, 151936, 1.0, 1.0), shared
        for out in (products, products.view(torch.bfloat16)[:, :151936]):
            args = (products, out, b, targets, tau, x, x, x, x, x, x, 151936, 151936, out.stride(0), 1.0, 1.0)
            for more in (False, True):
                yield epilogue._d_logits, args, shared | dict(HAS_LOGPS=True, HAS_LSE=more, HAS_ENTROPY=more)


def resources(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Of each function in a cubin: registers of a thread, bytes of its stack, bytes of static shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_triton_kernels_compile_and_fit(arch, tmp_path):
    driver.set_active(Device(arch))
    for kernel, args, options in launches():
        compiled = kernel.warmup(*args, grid=(1,), **options)
        assert compiled.metadata.shared <= SHARED_MEMORY[arch]
        (tmp_path / "k.cubin").write_bytes(compiled.asm["cubin"])
        ((registers, stack, _),) = resources(tmp_path / "k.cubin").values()
        print(f"sm_{arch} {compiled.metadata.name} {options}: {registers} registers, {stack} bytes of stack")
        assert registers <= 255


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_csrc_compiles_and_loads_without_a_gpu(tmp_path):
    import ctypes
    import runpy

    root = Path(__file__).parents[2]
    setup = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **kw: setup.update(kw))
        module = runpy.run_path(str(root / "setup.py"))
    library = tmp_path / "libgenevolve.so"
    assert module["compile_csrc"](library)
    launch = ctypes.CDLL(str(library)).genevolve_logprob_epilogue
    launch.restype = ctypes.c_int
    if not torch.cuda.is_available():
        pointer = ctypes.c_void_p
        numbers = [ctypes.c_longlong(n) for n in (1, 8, 8)] + [ctypes.c_float(1)] * 2 + [ctypes.c_longlong(-100)]
        status = launch(*[pointer(256)] * 6, *numbers, ctypes.c_int(0), ctypes.c_int(0), pointer(0))
        assert status == 35  # cudaErrorInsufficientDriver: refused, not crashed
