import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
source = (here / "pyg_attnpool/__init__.py").read_text()
version = re.search(r'__version__ = "(.+)"', source).group(1)

sparse = ["torch_sparse>=0.6.18", "torch_scatter>=2.1.2"]
mesh = ["openmesh>=1.2.1", "plyfile>=1.0"]
train = ["pytorch-lightning>=2.6", "torchmetrics>=1.4"]
data = ["anny>=0.6.2", "h5py>=3.10"]
viz = ["matplotlib>=3.8", "plotly>=5.20"]
examples = ["tyro>=1.0"]
# torch-geometric-pool imports scikit-learn without asking for it.
tgp = ["torch-geometric-pool>=1.0", "scikit-learn>=1.4"]
export = ["onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.20"]

# The compiled operations: one source for each instruction set, of which `ops/_cpu.py` takes one
# when it is imported. They need no header of PyTorch or Python, so they build anywhere; where there
# is no compiler for them, the package installs and works without.
targets = {"any": []}
if platform.machine() in ("x86_64", "AMD64"):
    targets |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", *openmp]
extensions = [
    Extension(
        f"pyg_attnpool.ops._cpu_{name}",
        ["pyg_attnpool/ops/cpu.cpp"],
        extra_compile_args=[*flags, *target],
        extra_link_args=openmp,
        optional=True,
    )
    for name, target in targets.items()
]

setup(
    name="pyg_attnpool",
    version=version,
    description="Learned feature aggregation between mesh levels, for PyTorch Geometric",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["pyg_attnpool", "pyg_attnpool.*"]),
    package_data={"pyg_attnpool": ["py.typed"]},
    ext_modules=extensions,
    install_requires=[
        "torch>=2.6",
        "torch_geometric>=2.6",
        "numpy>=1.26",
        "scipy>=1.11",
        "safetensors>=0.4",
    ],
    extras_require={
        "sparse": sparse,
        "mesh": mesh,
        "train": train,
        "data": data,
        "viz": viz,
        "examples": examples,
        "tgp": tgp,
        "export": export,
        "dev": [
            "pytest>=8",
            "ruff==0.14.5",
            "pre-commit>=4",
            "triton>=3.6; sys_platform == 'linux'",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
