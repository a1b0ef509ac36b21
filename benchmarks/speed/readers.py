r"""Readers of mesh files on good and damaged ones: what each gets right, and what it does to the
process that asks.

Every file of the fuzzer's corpus (``tests/hostile/corpus.py``) is read by every library in a
process with a gibibyte of memory to spare and five seconds a file. The truth is the strict reader
of the tests. Vertices may differ by single precision and faces may stand in another order, as long
as they are the same; a file of STL has no vertices, so its corners count.
"""

import collections
import json
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.hostile.corpus import corpus  # noqa: E402
from tests.hostile.strict import strict  # noqa: E402

SECONDS, MEMORY = 5, 1 << 30
VERDICTS = ("right", "refused rightly", "refused wrongly", "wrong", "hangs", "dies or memory")


def openmesh(path):
    import openmesh

    mesh = openmesh.read_polymesh(str(path))
    polygons = np.atleast_2d(mesh.face_vertex_indices())
    return mesh.points(), [[v for v in p if v >= 0] for p in polygons.tolist()]


def plyfile(path):
    import plyfile

    data = plyfile.PlyData.read(path)
    face = data["face"]
    name = next(p.name for p in face.properties if p.name in ("vertex_indices", "vertex_index"))
    vertices = np.stack([data["vertex"][axis] for axis in "xyz"], axis=1)
    return vertices, [list(p) for p in face[name]]


def meshio(path):
    import meshio

    mesh = meshio.read(path)
    cells = [c for c in mesh.cells if c.type in ("triangle", "quad", "polygon")]
    return mesh.points, [list(p) for c in cells for p in c.data]


def trimesh(path):
    import trimesh

    mesh = trimesh.load(path, process=False, maintain_order=True, force="mesh")
    return mesh.vertices, mesh.faces.tolist()


def pyg_attnpool(path):
    from pyg_attnpool.mesh import read_mesh

    return read_mesh(path)


READERS = {f.__name__: f for f in (openmesh, plyfile, meshio, trimesh, pyg_attnpool)}


def same(got, truth, soup: bool) -> bool:
    vertices, polygons = np.asarray(got[0], dtype=np.float64), got[1]
    faces = np.array([(p[0], b, c) for p in polygons for b, c in pairwise(p[1:])])
    expected, triangles = (np.array(a) for a in truth)
    if faces.shape != triangles.shape:
        return False
    if soup:
        vertices, expected = vertices[faces].reshape(-1, 3), expected[triangles].reshape(-1, 3)
    elif rows(faces) != rows(triangles):
        return False
    tolerance = 2e-7 * np.abs(expected).max()
    return vertices.shape == expected.shape and np.allclose(vertices, expected, 0, tolerance)


def rows(faces):
    return collections.Counter(tuple(np.roll(f, -f.argmin()).tolist()) for f in faces)


def verdict(read, path, truth) -> str:
    try:
        got = read(path)
    except MemoryError:
        return "dies or memory"
    except Exception:
        return "refused rightly" if truth is None else "refused wrongly"
    try:
        return "right" if truth and same(got, truth, path.suffix == ".stl") else "wrong"
    except Exception:
        return "wrong"


def work(name: str, first: int, seed: int, num_damaged: int):
    # In a process of its own: a verdict a line.
    warnings.simplefilter("ignore")
    cases = corpus(seed, num_damaged)
    read = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "first.ply"
        good.write_bytes(next(c.content for c in cases if c.name.endswith("little0.ply")))
        read(good)  # imports what it needs
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for case in cases[first:]:
            path = Path(folder) / case.name
            path.write_bytes(case.content)
            print(json.dumps(verdict(read, path, strict(case.name, case.content))), flush=True)


def judge(name: str, cases, arguments: list[str]) -> list[str]:
    verdicts: list[str] = []
    while len(verdicts) < len(cases):
        command = [sys.executable, __file__, "--work", name, str(len(verdicts)), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        seconds = 60.0  # for the imports
        while True:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            line = process.stdout.readline()
            hung = not timer.is_alive()
            timer.cancel()
            seconds = SECONDS
            if not line.startswith('"'):
                if not line:
                    break
                continue
            verdicts.append(json.loads(line))
        process.kill()
        process.wait()
        if len(verdicts) < len(cases):
            verdicts.append("hangs" if hung else "dies or memory")
    return verdicts


def main(seed: int = 0, num_damaged: int = 800):
    cases = corpus(seed, num_damaged)
    lines = [f"| | files | {' | '.join(VERDICTS)} |", "|---" * (2 + len(VERDICTS)) + "|"]
    for name in READERS:
        suffixes = ("ply",) if name == "plyfile" else ("ply", "obj", "off", "stl")
        verdicts = judge(name, cases, [str(seed), str(num_damaged)])
        for suffix in suffixes:
            for good in (True, False):
                count = collections.Counter(
                    v
                    for v, case in zip(verdicts, cases, strict=True)
                    if case.name.endswith(suffix) and (case.mesh is not None) == good
                )
                label = f"{name}, {suffix.upper()}, {'good' if good else 'damaged'}"
                numbers = " | ".join(str(count[v]) for v in VERDICTS)
                lines.append(f"| {label} | {count.total()} | {numbers} |")
        print("\n".join(lines[-2 * len(suffixes) :]), flush=True)
    text = (
        f"# Readers of mesh files\n\nSeed {seed}, {num_damaged} damaged files.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    (ROOT / "benchmarks" / "results" / "readers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(*map(int, sys.argv[1:]))
