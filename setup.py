"""Builds csrc/ with nvcc where there is one; the package works without it and the install never fails for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def compile_csrc(target: Path) -> bool:
    """Compile csrc/*.cu into `target`; says what happened and returns whether the library is there."""
    sources = sorted(map(str, (ROOT / "csrc").glob("*.cu")))
    nvcc = find_nvcc()
    if not sources or nvcc is None:
        print("genevolve-fast: no nvcc found, csrc/ is not compiled; Triton and torch implementations are used")
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-O3", "-std=c++17", "--shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for architecture in ARCHITECTURES:
        command += ["-gencode", architecture]
    result = subprocess.run([*command, "-o", str(target), *sources], capture_output=True, text=True)
    if result.returncode:
        print(f"genevolve-fast: nvcc failed, csrc/ is left out\n{result.stdout}{result.stderr}")
        return False
    print(f"genevolve-fast: csrc/ compiled into {target}")
    return True


class BuildWithCsrc(build_py):
    def run(self) -> None:
        super().run()
        in_place = getattr(self, "editable_mode", False)
        base = ROOT if in_place else Path(self.build_lib)
        compile_csrc(base / "genevolve_fast" / "_csrc" / "libgenevolve.so")


class PerPlatform(Distribution):
    """Where nvcc is, a compiled library goes in, and the wheel is for this platform only."""

    def has_ext_modules(self) -> bool:
        return find_nvcc() is not None


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the library is loaded by ctypes: no Python ABI


setup(distclass=PerPlatform, cmdclass={"build_py": BuildWithCsrc, "bdist_wheel": AnyPython})
