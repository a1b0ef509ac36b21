r"""Every writer of the package on a disk that is full after some bytes (a limit on the size of
files: the write fails), with temporary files on another file system where there is one: the write
raises an error, and what was there before is there; or it succeeds, and what is there is whole."""

import os
import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.files import write_bytes
from pyg_attnpool.mesh import write_mesh
from pyg_attnpool.training import quiet_lightning
from tests.hostile.kills import FIT, forked, hierarchy, meshes, models, save_models
from tests.mesh.meshes import icosphere

MEMORY = 8 << 30
OTHER = Path("/dev/shm")  # another file system than the usual one of temporary files, on Linux


def mesh_as(suffix):
    return lambda place: write_mesh(place / f"mesh.{suffix}", *icosphere(2))


def export_as(suffix):
    return lambda place: models()[0].export(place / f"model.{suffix}")


def train(place: Path) -> None:
    from pyg_attnpool import MorphableModel

    torch.manual_seed(1)
    model = MorphableModel.coma(hierarchy(), 2, channels=(4,))
    model.fit(meshes(), output=place / "run", logger=False, **{**FIT, "epochs": 2})


def store(place: Path) -> None:
    RegisteredMeshes(place.parent / "scans", cache=place)


def picture(place: Path) -> None:
    from pyg_attnpool.visualize.pictures import render, write_picture

    write_picture(place / "mesh.png", render(*icosphere(2), size=(64, 64)))


def animation(place: Path) -> None:
    from pyg_attnpool.visualize.pictures import render, write_animation

    write_animation(place / "mesh.gif", [render(*icosphere(2), size=(64, 64))] * 3)


def benchmark(place: Path) -> None:
    from benchmarks import report

    report.write(place, "table", "python", [{"a": i} for i in range(99)], {"t": [{"a": 1}]}, {})


WRITERS = {
    **{f"mesh as {suffix}": mesh_as(suffix) for suffix in ("ply", "obj", "off", "stl")},
    "hierarchy": lambda place: hierarchy().save(place / "h.npz"),
    "model": save_models,
    "model as pt2": export_as("pt2"),
    "model as onnx": export_as("onnx"),
    "model as page": export_as("html"),
    "checkpoints": train,
    "cache": store,
    "bytes": lambda place: write_bytes(place / "bytes", bytes(range(256)) * 30),
    "picture": picture,
    "animation": animation,
    "benchmark": benchmark,
}
NAMES = list(WRITERS)
SIZES: dict[str, int] = {}


def name(number: int) -> str:
    return NAMES[number % len(NAMES)]


def prepare(folder: Path) -> None:
    r"""Writes everything once."""
    quiet_lightning()
    torch.set_num_threads(1)
    (folder / "scans").mkdir()
    for i in range(100):
        write_mesh(folder / "scans" / f"{i}.ply", (1 + i / 100) * icosphere(2)[0], icosphere(2)[1])
    for what, write in WRITERS.items():
        place = folder / f"whole {what}"
        place.mkdir()
        if forked(lambda write=write, place=place: write(place)) != 0:
            raise RuntimeError(f"{what} fails on a disk with room")
        SIZES[what] = max(f.stat().st_size for f in place.rglob("*") if f.is_file())


def contents(place: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(place)): f.read_bytes()
        for f in place.rglob("*")
        if f.is_file() and f.name != ".lock"
    }


def case(number: int, folder: Path) -> None:
    rng, what = random.Random(number), name(number)
    place = folder / f"case-{number}"
    older = rng.random() < 0.7
    if older:
        shutil.copytree(folder / f"whole {what}", place)
    else:
        place.mkdir()
    before = contents(place)
    limit = int(SIZES[what] * rng.choice([0, rng.random(), rng.random(), 0.99]))
    elsewhere = OTHER.is_dir() and rng.random() < 0.5
    # A cache that is whole is not written again.
    if what == "cache" and older:
        file = next(place.glob("*.npz"))
        file.write_bytes(file.read_bytes()[:-1])
        before = {}

    def write() -> None:
        import resource

        if elsewhere:
            tempfile.tempdir = str(OTHER)
        np.random.seed(0)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with suppress(OSError, ValueError):
            WRITERS[what](place)
            return
        os._exit(77)

    status = forked(write)
    after = contents(place)
    assert status in (0, 77), f"ended with {status}, and no OSError or ValueError"
    if status == 77 and what != "cache":
        assert after == before or what == "model", f"changed: {changed(before, after)}"
    if status == 0:
        assert sorted(after) == sorted(contents(folder / f"whole {what}")), "something is missing"
    hidden = [n for n in after if Path(n).name.startswith(".") and n not in before]
    assert not hidden, f"{hidden} are left"
    if what == "cache":
        found = RegisteredMeshes(folder / "scans", cache=place).vertices
        assert torch.equal(found, RegisteredMeshes(folder / "scans").vertices)
    if what == "model" and after:
        from pyg_attnpool import MorphableModel

        MorphableModel.load(place / "model")
    shutil.rmtree(place)


def changed(before: dict, after: dict) -> list[str]:
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
