import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from pyg_attnpool.files import replacing

SUFFIXES = (".obj", ".ply", ".off", ".stl")


def read_mesh(path: str | Path) -> tuple[ndarray, ndarray]:
    r"""Reads a triangle mesh through :obj:`openmesh`. Vertices keep the order of the file; polygons
    become fans of triangles around their first vertex.

    An STL file lists corners, not vertices: equal corners become one vertex, in the order of first
    appearance.

    Args:
        path (str or Path): An OBJ, PLY, OFF or STL file.

    Returns:
        Vertices :obj:`[N, 3]` (float64, in the unit of the file, at the single precision that
        openmesh reads) and faces :obj:`[F, 3]` (int64).

    Raises:
        ImportError: If :obj:`openmesh` is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown, or the file is damaged, cut off or without faces. What
            the faces make up is for :meth:`check_mesh` to judge.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a mesh file at {path} (got none)")
    om = _openmesh()
    num_vertices, num_faces = _declared(path)
    with _captured_stderr() as messages:
        try:
            mesh = om.read_polymesh(str(path))
        except RuntimeError as e:
            reason = " ".join(messages()) or e
            raise ValueError(f"Expected a whole mesh in {path} (got: {reason})") from e
    vertices = np.array(mesh.points(), dtype=np.float64).reshape(-1, 3)
    polygons = np.asarray(mesh.face_vertex_indices(), dtype=np.int64)
    polygons = polygons.reshape(mesh.n_faces(), -1) if polygons.size else np.empty((0, 3), int)

    # openmesh leaves out what it cannot parse and doubles the vertices of what is not manifold.
    num_vertices = len(vertices) if num_vertices is None else num_vertices
    if len(vertices) < num_vertices or len(polygons) != num_faces:
        raise ValueError(
            f"Expected {num_vertices} vertices and {num_faces} faces in {path} as it declares (got "
            f"{len(vertices)} and {len(polygons)}): it is cut off, or holds a number or face that "
            f"cannot be read"
        )
    if len(vertices) > num_vertices:
        polygons = np.where(polygons < 0, -1, _undouble(vertices, num_vertices)[polygons])
        vertices = vertices[:num_vertices]
    if len(polygons) == 0:
        raise ValueError(f"Expected a mesh of at least one face in {path} (got none)")
    return vertices, _fans(polygons)


def read_features(path: str | Path) -> dict[str, ndarray]:
    r"""Reads what a PLY file says of its vertices beyond their coordinates, through
    :obj:`plyfile`.

    Args:
        path (str or Path): A PLY file.

    Returns:
        :obj:`"color"` :obj:`[N, 3]` from 0 to 1, :obj:`"normal"` :obj:`[N, 3]` and every further
        property :obj:`[N, 1]` by its name, as the file has them (float64).

    Raises:
        ImportError: If :obj:`plyfile` is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no PLY file, or damaged.
    """
    path = Path(path)
    if path.suffix.lower() != ".ply":
        raise ValueError(f"Expected a PLY file to read features from (got {path.name})")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a mesh file at {path} (got none)")
    plyfile = _plyfile()
    try:
        vertex = plyfile.PlyData.read(path)["vertex"].data
    except (plyfile.PlyParseError, KeyError, ValueError) as e:
        raise ValueError(f"Expected a whole PLY file in {path} (got: {e})") from e
    left = [name for name in vertex.dtype.names if name not in ("x", "y", "z")]
    features = {}
    for name, parts in (("color", ("red", "green", "blue")), ("normal", ("nx", "ny", "nz"))):
        if set(parts) <= set(left):
            columns = np.stack([vertex[part].astype(np.float64) for part in parts], axis=1)
            integers = np.issubdtype(vertex.dtype[parts[0]], np.integer)
            features[name] = columns / 255 if name == "color" and integers else columns
            left = [name for name in left if name not in parts]
    return features | {name: vertex[name].astype(np.float64)[:, None] for name in left}


def write_mesh(
    path: str | Path,
    vertices: ndarray,
    faces: ndarray,
    features: dict[str, ndarray] | None = None,
) -> None:
    r"""Writes a triangle mesh at single precision, to a temporary name first.

    Args:
        path (str or Path): An OBJ, PLY, OFF or STL file; all but OBJ are binary.
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        features (dict, optional): Further values of the vertices, as :meth:`read_features` gives
            them, for PLY files alone. (default: :obj:`None`)

    Raises:
        ImportError: If :obj:`openmesh`, or for features :obj:`plyfile`, is not installed.
        ValueError: If the format is unknown or has no place for features, or the mesh is not valid
            by :meth:`check_mesh`.
    """
    path = Path(path)
    _check_suffix(path)
    vertices, faces = check_mesh(vertices, faces)
    if features and path.suffix.lower() != ".ply":
        raise ValueError(f"Expected features to a PLY file (got {path.name})")
    with replacing(path) as temporary:
        if features:
            _write_features(temporary, vertices, faces, features)
        elif path.suffix.lower() == ".obj":
            # openmesh writes six decimals, which a mesh of millimetres in metres does not survive.
            with open(temporary, "w") as f:
                f.writelines("v {:.9g} {:.9g} {:.9g}\n".format(*v) for v in vertices)
                f.writelines("f {} {} {}\n".format(*face) for face in faces + 1)
        else:
            om = _openmesh()
            om.write_mesh(str(temporary), om.TriMesh(vertices, faces), binary=True)


def check_mesh(vertices: ndarray, faces: ndarray) -> tuple[ndarray, ndarray]:
    r"""Checks that a mesh is an orientable manifold, with or without boundary, whose every vertex
    is part of a face.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.

    Returns:
        Vertices as float64 and faces as int64.

    Raises:
        TypeError: If the arrays are not of numbers, or faces not of integers.
        ValueError: If shapes are wrong, the mesh is empty, a coordinate is not finite, a face is
            degenerate or out of range, an edge has more than two faces or two of opposite
            orientation, a vertex joins two fans of faces, or is part of none; the message names
            the first.
    """
    vertices, faces = np.asarray(vertices), np.asarray(faces)
    if not np.issubdtype(vertices.dtype, np.floating):
        raise TypeError(f"Expected floating point vertices (got {vertices.dtype})")
    if not np.issubdtype(faces.dtype, np.integer):
        raise TypeError(f"Expected faces of integers (got {faces.dtype})")
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(
            f"Expected vertices [N, 3] and faces [F, 3] "
            f"(got {list(vertices.shape)} and {list(faces.shape)})"
        )
    if len(vertices) == 0 or len(faces) == 0:
        raise ValueError(
            f"Expected a mesh of at least one face "
            f"(got {len(vertices)} vertices and {len(faces)} faces)"
        )
    vertices, faces = vertices.astype(np.float64), faces.astype(np.int64)
    broken = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(broken) > 0:
        raise ValueError(
            f"Expected finite vertices (got {vertices[broken[0]].tolist()} at vertex {broken[0]})"
        )
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"Expected faces of vertices 0 to {len(vertices) - 1} "
            f"(got {faces.min()} to {faces.max()})"
        )
    repeated = np.flatnonzero((faces == np.roll(faces, 1, axis=1)).any(axis=1))
    if len(repeated) > 0:
        raise ValueError(
            f"Expected faces of three different vertices "
            f"(got {faces[repeated[0]].tolist()} at face {repeated[0]})"
        )
    lonely = np.flatnonzero(np.bincount(faces.ravel(), minlength=len(vertices)) == 0)
    if len(lonely) > 0:
        raise ValueError(
            f"Expected every vertex to be part of a face (got {len(lonely)} that are not, the "
            f"first is vertex {lonely[0]})"
        )
    _check_manifold(faces, len(vertices))
    return vertices, faces


def _write_features(
    path: Path, vertices: ndarray, faces: ndarray, features: dict[str, ndarray]
) -> None:
    parts = {"color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
    columns = dict(zip("xyz", vertices.T, strict=True))
    for name, values in features.items():
        values = np.asarray(values)
        names = parts.get(name, (name,))
        if values.shape != (len(vertices), len(names)):
            raise ValueError(
                f"Expected feature '{name}' of shape {[len(vertices), len(names)]} "
                f"(got {list(values.shape)})"
            )
        columns |= dict(zip(names, values.T, strict=True))
    plyfile = _plyfile()
    vertex = np.empty(len(vertices), dtype=[(name, "f4") for name in columns])
    for name, column in columns.items():
        vertex[name] = column
    face = np.empty(len(faces), dtype=[("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = faces
    elements = (plyfile.PlyElement.describe(v, n) for v, n in ((vertex, "vertex"), (face, "face")))
    plyfile.PlyData(list(elements), byte_order="<").write(path)


def edges(faces: ndarray) -> ndarray:
    r"""The edges :obj:`[E, 2]` of faces in both directions, sorted, without duplicates."""
    source, target = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    size = int(faces.max()) + 1  # one number sorts much faster than a row of two
    edge = np.unique(np.concatenate([source * size + target, target * size + source]))
    return np.stack(np.divmod(edge, size), axis=1)


def _check_manifold(faces: ndarray, num_vertices: int) -> None:
    source, target = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    low, high = np.minimum(source, target), np.maximum(source, target)
    edge, count = np.unique(low * num_vertices + high, return_counts=True)
    directed, directed_count = np.unique(source * num_vertices + target, return_counts=True)
    if count.max() > 2:
        a, b = divmod(int(edge[count.argmax()]), num_vertices)
        raise ValueError(
            f"Expected a manifold mesh, at most two faces at an edge "
            f"(got {count.max()} at the edge of vertices {a} and {b})"
        )
    if directed_count.max() > 1:
        a, b = divmod(int(directed[directed_count.argmax()]), num_vertices)
        raise ValueError(
            f"Expected faces of one orientation (got two opposite ones at the edge of vertices "
            f"{a} and {b})"
        )
    # Around a vertex, every face leads from one neighbour to the next. On a manifold that is one
    # cycle or one path: as many fans as there are components among the corners of the vertex.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    halfedge, reverse = source * num_vertices + target, target * num_vertices + source
    _, inner, twin = np.intersect1d(halfedge, reverse, assume_unique=True, return_indices=True)
    # The corner at the start of a half-edge is at the end of its twin, the twin's next corner.
    following = twin - twin % 3 + (twin + 1) % 3
    graph = coo_array((np.ones(len(inner)), (inner, following)), shape=(faces.size, faces.size))
    num_fans, fan = connected_components(graph, directed=False)
    if num_fans > num_vertices:
        owner = np.zeros(num_fans, dtype=np.int64)
        owner[fan] = source
        vertex = int(np.bincount(owner).argmax())
        raise ValueError(
            f"Expected a manifold mesh, one fan of faces around a vertex "
            f"(got {np.bincount(owner).max()} at vertex {vertex})"
        )


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Expected a file name ending in one of {SUFFIXES} (got {path.name})")


def _plyfile() -> Any:
    try:
        import plyfile
    except ImportError as e:
        raise ImportError(
            "Features of PLY files require 'plyfile': install it with "
            '`pip install "pyg_attnpool[mesh]" --no-build-isolation`'
        ) from e
    return plyfile


def _openmesh() -> Any:
    try:
        import openmesh
    except ImportError as e:
        raise ImportError(
            "Mesh files require 'openmesh': install it with "
            '`pip install "pyg_attnpool[mesh]" --no-build-isolation`'
        ) from e
    return openmesh


def _declared(path: Path) -> tuple[int | None, int]:
    # How many vertices and faces a file says it has, or lists line by line. openmesh does not
    # notice every file that is cut off, and some make it read forever.
    content, kind = path.read_bytes(), path.suffix.lower()[1:]
    read = {"obj": _declared_obj, "ply": _declared_ply, "off": _declared_off, "stl": _declared_stl}
    try:
        return read[kind](content)
    except (ValueError, KeyError, IndexError) as e:
        raise ValueError(
            f"Expected a whole {kind.upper()} file in {path} (got: {e or 'no header'})"
        ) from e


def _declared_obj(content: bytes) -> tuple[int, int]:
    starts = [line.split(maxsplit=1)[:1] for line in content.splitlines()]
    return starts.count([b"v"]), starts.count([b"f"])


def _declared_ply(content: bytes) -> tuple[int, int]:
    header = content[: content.index(b"end_header")].splitlines()
    elements = [line.split() for line in header if line.startswith(b"element ")]
    count = {name: int(number) for _, name, number in elements}
    return count[b"vertex"], count[b"face"]


def _declared_off(content: bytes) -> tuple[int, int]:
    if b"BINARY" in content[:32].upper():
        start = content.index(b"\n") + 1
        num_vertices, num_faces, _ = np.frombuffer(content, "<u4", 3, start).tolist()
        if len(content) < start + 12 + 12 * num_vertices + 16 * num_faces:
            raise ValueError("cut off")
        return num_vertices, num_faces
    if b"#" in content:
        raise ValueError("comments, which openmesh cannot read in this format")
    lines = [line.split() for line in content.splitlines() if line.strip()]
    if lines[0][-1].isdigit():  # the counts beside the keyword
        lines.insert(1, lines[0][-3:])
    num_vertices, num_faces = map(int, lines[1][:2])
    last = lines[1 + num_vertices + num_faces]
    if len(last) <= int(last[0]):
        raise ValueError("cut off")
    return num_vertices, num_faces


def _declared_stl(content: bytes) -> tuple[None, int]:
    if content.lstrip()[:5] == b"solid" and b"facet" in content[:1000]:
        num_faces = content.count(b"endfacet")
        if b"endsolid" not in content:
            raise ValueError("cut off")
    else:
        num_faces = int(np.frombuffer(content, "<u4", 1, 80)[0])
        if len(content) < 84 + 50 * num_faces:
            raise ValueError("cut off")
    return None, num_faces


def _undouble(vertices: ndarray, num_vertices: int) -> ndarray:
    # openmesh appends a copy of a vertex for every face that will not fit its half-edges.
    first = {tuple(v): i for i, v in reversed(list(enumerate(vertices[:num_vertices].tolist())))}
    copies = [first[tuple(v)] for v in vertices[num_vertices:].tolist()]
    return np.concatenate([np.arange(num_vertices), np.array(copies, dtype=np.int64)])


def _fans(polygons: ndarray) -> ndarray:
    # Shorter polygons are padded with -1 at the end.
    corners = np.stack(
        [
            np.stack([polygons[:, 0], polygons[:, i], polygons[:, i + 1]], axis=1)
            for i in range(1, polygons.shape[1] - 1)
        ],
        axis=1,
    ).reshape(-1, 3)
    return corners[corners[:, 2] >= 0]


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], list[str]]]:
    # openmesh prints its complaints from C++, one for every material of every file. Kept back,
    # they tell why a file could not be read.
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)

        def messages() -> list[str]:
            log.seek(0)
            return log.read().decode(errors="replace").split()

        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
