r"""The builds of the compiled library, and which of them this processor runs."""

from pathlib import Path

import torch

import pyg_attnpool

PACKAGE = Path(pyg_attnpool.__file__).parent
# What a processor of each capability can run.
RUNS = {"AVX512": ["any", "avx2", "avx512"], "AVX2": ["any", "avx2"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["any"]
)


def builds(name):
    return sorted((PACKAGE / "ops").glob(f"_cpu_{name}.*"))
