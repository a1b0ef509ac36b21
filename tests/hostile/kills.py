r"""Work that is killed (SIGKILL) at random moments, again and again until it is done: the result is
that of work that was never killed, to the last bit, and what is there meanwhile is whole."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.mesh import read_mesh, write_mesh
from pyg_attnpool.training import quiet_lightning
from tests.hostile.folders import equal
from tests.mesh.meshes import icosphere

MEMORY = 8 << 30
KINDS = ("training", "model", "mesh", "training", "cache", "hierarchy", "training", "sweep")
FIT = dict(accelerator="cpu", enable_progress_bar=False, optimizer="sgd", batch_size=8, epochs=6)
SECONDS: dict[str, float] = {}
WHOLE: dict = {}


def name(number: int) -> str:
    return KINDS[number % len(KINDS)]


def prepare(folder: Path) -> None:
    r"""Does all work once without a kill."""
    quiet_lightning()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    torch.manual_seed(0)
    write_scans(folder / "scans")
    for kind in dict.fromkeys(KINDS):
        place = folder / f"whole-{kind}"
        place.mkdir()
        start = time.perf_counter()
        if forked(lambda kind=kind, place=place: WORK[kind](place)) != 0:
            raise RuntimeError(f"{kind} fails without a kill")
        SECONDS[kind] = time.perf_counter() - start
        WHOLE[kind] = RESULTS[kind](place)


def forked(work: Callable[[], None], seconds: float | None = None) -> int:
    r"""Runs work in a child, which is killed after some seconds. Returns its exit code."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def case(number: int, folder: Path) -> None:
    rng, kind = random.Random(number), name(number)
    place = folder / f"case-{number}"
    place.mkdir()
    ends = []
    while len(ends) < 3:
        ends.append(forked(lambda: WORK[kind](place), rng.uniform(0, 1.1 * SECONDS[kind])))
        assert ends[-1] in (0, -signal.SIGKILL), f"ended with {ends}"
        CHECKS[kind](place)
    assert forked(lambda: WORK[kind](place)) == 0, f"fails after {ends}"
    assert equal(RESULTS[kind](place), WHOLE[kind]), f"another result after {ends}"
    # A kill may leave a hidden file, and work that goes on none that is seen.
    left = [f.name for f in place.iterdir() if not f.name.startswith(".")]
    wanted = [f.name for f in (folder / f"whole-{kind}").iterdir() if not f.name.startswith(".")]
    assert sorted(left) == sorted(wanted), f"{sorted(left)} are left"
    shutil.rmtree(place)


# Work ################################################################################


def hierarchy() -> MeshHierarchy:
    return MeshHierarchy.from_template(icosphere(1), factors=[3])


def meshes() -> torch.Tensor:
    noise = torch.randn(40, 42, 3, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(icosphere(1)[0]).float() + 0.05 * noise


def write_scans(folder: Path) -> None:
    folder.mkdir()
    vertices, faces = icosphere(3)
    for i, scale in enumerate(np.linspace(0.1, 0.2, 200)):
        write_mesh(folder / f"{i}.ply", scale * vertices, faces)


def train(place: Path) -> None:
    torch.manual_seed(1)
    model = MorphableModel.coma(hierarchy(), 2, channels=(4,))
    model.fit(meshes(), output=place / "run", resume=True, **FIT)
    if not (place / "model").exists():
        model.save(place / "model")


def models() -> list[MorphableModel]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(MorphableModel.coma(hierarchy(), 2, channels=(4,)).freeze())
    return made


def save_models(place: Path) -> None:
    for model in models() * 6:
        model.save(place / "model")


def write_meshes(place: Path) -> None:
    for i in (*range(4), *range(4)):
        for suffix in ("ply", "obj", "off", "stl"):
            write_mesh(place / f"mesh.{suffix}", *icosphere(i))


def save_hierarchies(place: Path) -> None:
    for factor in (2, 3, 4, 5):
        made = MeshHierarchy.from_template(icosphere(1), factors=[factor])
        for _ in range(5):
            made.save(place / "h.npz")


def store(place: Path) -> None:
    RegisteredMeshes(place.parent / "scans", cache=place / "cache")


def sweep(place: Path) -> None:
    from benchmarks.paper.options import Options
    from benchmarks.paper.sweep import sweep
    from tests.benchmarks.paper.few import FEW

    options = Options(
        data=(str(place.parent / "scans"),),
        scale="smoke",
        seeds=(0,),
        device="cpu",
        output=place / "sweep",
        root=place.parent,
        resume=True,
    )
    sweep(FEW, options)


def nothing(place: Path) -> None:
    pass


def whole_models(place: Path) -> None:
    if (place / "model").exists() or (place / ".model.old").exists():
        found = state(MorphableModel.load(place / "model"))
        assert any(equal(found, state(model)) for model in models()), "a mixture of models"


def whole_meshes(place: Path) -> None:
    for file in place.glob("mesh.*"):
        assert len(read_mesh(file)[0]) in (12, 42, 162, 642), f"{file.name} is no whole mesh"


def whole_hierarchies(place: Path) -> None:
    if (place / "h.npz").exists():
        MeshHierarchy.load(place / "h.npz")


def state(model: MorphableModel) -> tuple:
    return tuple(model.state_dict().values())


def rows(place: Path) -> tuple:
    from tests.benchmarks.paper.few import untimed

    return tuple(map(str, untimed(place / "sweep" / "few.csv")))


def trained(place: Path) -> tuple:
    from pyg_attnpool.training import load_checkpoint

    return (
        *state(MorphableModel.load(place / "model")),
        *load_checkpoint(place / "run" / "last.ckpt")["state_dict"].values(),
    )


WORK = {
    "training": train,
    "model": save_models,
    "mesh": write_meshes,
    "cache": store,
    "hierarchy": save_hierarchies,
    "sweep": sweep,
}
CHECKS = {
    "training": nothing,
    "model": whole_models,
    "mesh": whole_meshes,
    "cache": nothing,
    "hierarchy": whole_hierarchies,
    "sweep": nothing,
}
RESULTS = {
    "training": trained,
    "model": lambda place: state(MorphableModel.load(place / "model")),
    "mesh": lambda place: tuple(
        torch.from_numpy(part) for file in sorted(place.glob("mesh.*")) for part in read_mesh(file)
    ),
    "cache": lambda place: (
        RegisteredMeshes(place.parent / "scans", cache=place / "cache").vertices.clone(),
    ),
    "hierarchy": lambda place: (MeshHierarchy.load(place / "h.npz").hash,),
    "sweep": rows,
}
