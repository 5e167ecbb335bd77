"""Every Triton kernel compiled ahead of time for sm_80 and sm_90, and csrc/ by nvcc where there is one."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from genevolve_fast.kernels import logprob_epilogue as epilogue  # noqa: E402
from genevolve_fast.kernels import prefix_attention as attention  # noqa: E402
from genevolve_fast.ops import csrc  # noqa: E402

ROOT = Path(__file__).parents[2]
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


def attention_launches(dtype, d):
    """What the public functions launch for heads of d numbers."""
    tokens, kv_heads, groups = 40, 2, 4
    tiles, runs = torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    q = torch.zeros(tokens, groups * kv_heads, d, dtype=dtype)
    k = torch.zeros(tokens, kv_heads, d, dtype=dtype)
    lse, total = torch.zeros(groups * kv_heads, tokens), torch.zeros(k.shape)
    options = attention._options(d, attention.tile_tokens(d, dtype))
    numbers, strides = (groups, tokens, d, 0.1), attention._strides
    yield attention._forward, (q, k, k, k, k, q, lse, tiles, *numbers, *strides(q, k, k, k, k, q)), options
    args = (q, q, k, k, k, k, q, lse, lse, q, tiles, *numbers, *strides(q, q, k, k, k, k, q, q))
    yield attention._dq, args, options
    yield attention._dkv, (q, q, k, k, lse, lse, k, k, tiles, *numbers, *strides(q, q, k, k, k, k)), options
    args = (q, q, k, k, lse, lse, total, total, runs, 2, tokens, *numbers, *strides(q, q, k, k, total, total))
    yield attention._prefix_dkv, args, options
    args = (q, lse, q, lse, tokens * groups * kv_heads, groups * kv_heads, d, tokens, tokens)
    yield attention._merge, args, dict(ROWS=16, D=triton.next_power_of_2(d), num_warps=4)


def resources(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Of each function in a cubin: registers of a thread, bytes of its stack, bytes of static shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_triton_kernels_compile_and_fit(arch, tmp_path):
    compile_and_fit(arch, launches(), tmp_path)


SLOW = [(torch.float32, 64), (torch.float32, 80), (torch.float32, 256), (torch.bfloat16, 64), (torch.bfloat16, 256)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("dtype", "d"),
    [(torch.float32, 128), (torch.bfloat16, 128), *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)],
)
def test_attention_kernels_compile_and_fit(arch, dtype, d, tmp_path):
    assert compile_and_fit(arch, attention_launches(dtype, d), tmp_path) <= 512  # a spill of kilobytes is a wrong tile


def compile_and_fit(arch, launches, tmp_path) -> int:
    """The largest stack, after checking that shared memory and registers suffice."""
    driver.set_active(Device(arch))
    largest = 0
    for kernel, args, options in launches:
        compiled = kernel.warmup(*args, grid=(1,), **options)
        assert compiled.metadata.shared <= SHARED_MEMORY[arch]
        (tmp_path / "k.cubin").write_bytes(compiled.asm["cubin"])
        ((registers, stack, _),) = resources(tmp_path / "k.cubin").values()
        print(f"sm_{arch} {compiled.metadata.name} {options}: {registers} registers, {stack} bytes of stack")
        assert registers <= 255
        largest = max(largest, stack)
    return largest


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/ compiled as setup.py does."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        build = runpy.run_path(str(ROOT / "setup.py"))
    path = tmp_path_factory.mktemp("csrc") / "libgenevolve.so"
    assert build["compile_csrc"](path)
    return path


def cuobjdump(*arguments) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def test_csrc_loads_and_is_refused_without_a_gpu(library):
    loaded = csrc.Library(library)
    if torch.cuda.is_available():
        return
    problem, softmax, gradient = csrc._Problem(rows=1, vocabulary=8), csrc._Softmax(), csrc._Gradient()
    statuses = [
        loaded.handle.genevolve_softmax(problem, softmax, None),
        loaded.handle.genevolve_d_logits(problem, softmax, gradient, None, None),
        loaded.handle.genevolve_softmax_d_logits(problem, softmax, gradient, gradient, None),
    ]
    assert set(statuses) <= {35, 100}, statuses  # cudaErrorInsufficientDriver, cudaErrorNoDevice: refused, not crashed
    loaded.device = "cpu"  # no stream to ask torch for
    with pytest.raises(RuntimeError, match=r"genevolve_softmax: cudaError\w+ \((35|100)\): \w+"):
        loaded.launch("genevolve_softmax", torch.device("cpu"), problem, softmax)


def test_csrc_holds_every_architecture_and_spills_nothing(library):
    assert ".sm_90.ptx" in cuobjdump("--list-ptx", library)  # what later GPUs compile
    usage = re.split(r"arch = (sm_\w+)", cuobjdump("--dump-resource-usage", library))
    seen = []
    for arch, section in zip(usage[1::2], usage[2::2], strict=True):
        for name, rich, numbers in re.findall(r"Function \w*?\d([a-z_]+_kernel)ILb([01])E\w*:\s*(REG.*)", section):
            registers, stack, shared, local = (
                int(re.search(rf"{kind}:(\d+)", numbers).group(1)) for kind in ("REG", "STACK", "SHARED", "LOCAL")
            )
            print(
                f"{arch} {name}{' with bias or softcap' if rich == '1' else ''}: {registers} registers, "
                f"{stack} bytes of stack, {local} of local memory, {shared} of shared memory"
            )
            assert stack == local == 0  # so nothing is spilled
            assert registers <= 56  # three blocks of 384 threads share a multiprocessor
            if name == "one_read_kernel":
                assert shared <= 1024 + 256  # the system's on sm_90, and what csrc/ keeps free beside the row
            seen.append((arch, name, rich))
    names = ("softmax_kernel", "d_logits_kernel", "two_reads_kernel", "one_read_kernel")
    assert sorted(seen) == sorted((a, n, r) for a in ("sm_80", "sm_90a") for n in names for r in "01")
