"""The sources for AVX-512 and AMX on a processor without: compiled for AVX2, with all that they use
of those in plain C++ (emulated/immintrin.h). Slow, and the same sums."""

import hashlib
from pathlib import Path

from flexmoe.kernels import cpu

HERE = Path(__file__).with_name("emulated")


def emulate(monkeypatch, target):
    """Have `target` of `cpu.TARGETS` compiled so."""
    version = hashlib.sha256((HERE / "immintrin.h").read_bytes()).hexdigest()[:8]
    flags = ("-Wno-psabi", f"-I{HERE}", f"-DVERSION={version}")  # else a build of before is taken
    amx = ("-DAMX",) if target == "AMX" else ()
    monkeypatch.setitem(cpu.TARGETS, target, (*cpu.TARGETS["AVX2"], *flags, *amx))
