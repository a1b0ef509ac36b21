import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy import ndarray

from pyg_attnpool.files import write_bytes
from pyg_attnpool.mesh.formats import (
    obj_bytes,
    off_bytes,
    ply_bytes,
    read_obj,
    read_off,
    read_ply,
    read_ply_elements,
    read_stl,
    read_xyz,
    stl_bytes,
)
from pyg_attnpool.mesh.graph import components

READERS = {".obj": read_obj, ".ply": read_ply, ".off": read_off, ".stl": read_stl}
SUFFIXES = tuple(READERS)
CLOUDS = (".xyz", ".npy")  # of point clouds alone
UNIT_LENGTH = 1e-2  # how far from one the length of a unit normal may be
REPAIR = "; pyg_attnpool.mesh.repair mends it, and takes registered meshes along"
ROUNDING = 1e-5  # of the size of a mesh, which single precision may move a vertex by
FEATURES = {"color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}  # of PLY files


def read_mesh(path: str | Path) -> tuple[ndarray, ndarray]:
    r"""Reads a triangle mesh. Vertices keep the order of the file and the precision of its numbers;
    polygons become fans of triangles around their first vertex.

    A file is read whole or refused: every number, line and byte of it is accounted for. An STL
    file lists corners, not vertices: equal corners become one vertex, in the order of first
    appearance. The mesh that the faces make up is for :meth:`check_mesh` to judge and for
    :meth:`~pyg_attnpool.mesh.repair` to mend.

    Models compute in single precision, seven digits. Coordinates far from the origin, as those of
    maps are, lose what makes up the mesh there, so models and data sets refuse them
    (:func:`~pyg_attnpool.mesh.io.in_single_precision`).

    Args:
        path (str or Path): An OBJ, PLY, OFF or STL file.

    Returns:
        Vertices :obj:`[N, 3]` (float64, in the unit of the file) and faces :obj:`[F, 3]` (int64).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown, or the file is damaged, cut off or without faces, or
            has a coordinate that is not finite, a polygon of fewer than three corners or of
            vertices that it does not have; the message names the file and the place.

    Example:
        >>> from pyg_attnpool.mesh import read_mesh, write_mesh
        >>> write_mesh("template.obj", *template)
        >>> vertices, faces = read_mesh("template.obj")
        >>> vertices.shape, faces.shape
        ((642, 3), (1280, 3))
    """
    path = _mesh_file(path)
    with _named(path):
        vertices, corners, counts = READERS[path.suffix.lower()](path)
        if len(counts) == 0:
            raise ValueError("no faces, and a mesh has at least one face")
    return vertices, _fans(corners, counts)


def read_scan(path: str | Path) -> tuple[ndarray, ndarray | None, ndarray | None]:
    r"""Reads a triangle mesh as :meth:`read_mesh` does, or a point cloud: a mesh file that has
    vertices alone, with normals where a PLY file has them; an XYZ file with a point in every line;
    or an array in an NPY file. Of these two, points have three numbers, or six of which the last
    three are a unit normal.

    Args:
        path (str or Path): An OBJ, PLY, OFF, STL, XYZ or NPY file.

    Returns:
        Points :obj:`[P, 3]` (float64, in the unit of the file), and faces :obj:`[F, 3]` (int64)
        and unit normals :obj:`[P, 3]` of the points, or :obj:`None` where the file has none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As of :meth:`read_mesh` but for missing faces; or if there are no points, or
            numbers beside their coordinates that are no unit normal.

    Example:
        >>> from pyg_attnpool.mesh import read_scan
        >>> np.save("cloud.npy", meshes[0].numpy())
        >>> points, faces, normals = read_scan("cloud.npy")
        >>> points.shape, faces, normals
        ((642, 3), None, None)
    """
    path = _mesh_file(path, (*SUFFIXES, *CLOUDS))
    if path.suffix.lower() in CLOUDS:
        with _named(path):
            return _cloud(read_xyz(path) if path.suffix.lower() == ".xyz" else _array(path))
    with _named(path):
        points, corners, counts = READERS[path.suffix.lower()](path)
        if len(counts) > 0:
            return points, _fans(corners, counts), None
        normals = read_features(path).get("normal") if path.suffix.lower() == ".ply" else None
        points = _cloud(points)[0]
        if normals is None:
            return points, None, None
        # A file that names its normals may have them of any length, or have left them empty.
        length = np.linalg.norm(normals.astype(np.float64), axis=1, keepdims=True)
        known = np.isfinite(length).all() and (length > 0).all()
        return points, None, normals / length if known else None


def _cloud(rows: ndarray) -> tuple[ndarray, None, ndarray | None]:
    if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] not in (3, 6):
        raise ValueError(f"points of shape {list(rows.shape)}, not [P, 3] or with normals [P, 6]")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken) > 0:
        raise ValueError(f"{rows[broken[0]].tolist()} at point {broken[0]}")
    points, normals = rows[:, :3], rows[:, 3:]
    if normals.size == 0:
        return points, None, None
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    other = np.flatnonzero(np.abs(length - 1) > UNIT_LENGTH)
    if len(other) > 0:
        raise ValueError(f"{normals[other[0]].tolist()} for the unit normal of point {other[0]}")
    return points, None, normals / length


def _array(path: Path) -> ndarray:
    # The header tells the size before any memory is asked for; objects are refused there, too.
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OverflowError, SyntaxError, OSError) as e:
        raise ValueError(f"no array: {e}") from e
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{getattr(array, 'dtype', 'several arrays')}, not numbers")
    return np.array(array, dtype=np.float64)


def read_features(path: str | Path) -> dict[str, ndarray]:
    r"""Reads what a PLY file says of its vertices beyond their coordinates; lists are left out.

    Args:
        path (str or Path): A PLY file.

    Returns:
        :obj:`"color"` :obj:`[N, 3]` from 0 to 1, :obj:`"normal"` :obj:`[N, 3]` and every further
        property :obj:`[N, 1]` by its name, as the file has them (float64).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no PLY file, or damaged.

    Example:
        >>> from pyg_attnpool.mesh import read_features, write_mesh
        >>> colors = np.full((642, 3), 0.5)
        >>> write_mesh("colored.ply", *template, features={"color": colors})
        >>> read_features("colored.ply")["color"].shape
        (642, 3)
    """
    path = _mesh_file(path)
    if path.suffix.lower() != ".ply":
        raise ValueError(f"Expected a PLY file to read features from (got {path.name})")
    with _named(path):
        vertex = read_ply_elements(path).get("vertex", {})
        if not vertex:
            raise ValueError("no vertices")
    values = {name: v for name, v in vertex.items() if name not in "xyz" and isinstance(v, ndarray)}
    features = {}
    for name, parts in FEATURES.items():
        if set(parts) <= set(values):
            columns = [values.pop(part) for part in parts]
            integers = np.issubdtype(columns[0].dtype, np.integer)
            features[name] = np.stack(columns, axis=1).astype(np.float64)
            if name == "color" and integers:
                features[name] /= 255
    return features | {name: v.astype(np.float64)[:, None] for name, v in values.items()}


def write_mesh(
    path: str | Path,
    vertices: ndarray,
    faces: ndarray,
    features: dict[str, ndarray] | None = None,
) -> None:
    r"""Writes a triangle mesh, in single precision where vertices are float32, else in double;
    STL has single precision alone, and takes no mesh that it would change. The file is whole, or is
    what it was before.

    Args:
        path (str or Path): An OBJ, PLY, OFF or STL file; PLY and STL are binary.
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        features (dict, optional): Further values of the vertices, as :meth:`read_features` gives
            them, for PLY files alone. Those of type uint8 are written as bytes, as most programs
            want colours. (default: :obj:`None`)

    Raises:
        OSError: If the file could not be written whole.
        ValueError: If the format is unknown or has no place for features, the mesh is not valid
            by :meth:`check_mesh`, or STL has too few digits for it.

    Example:
        >>> from pyg_attnpool.mesh import write_mesh
        >>> write_mesh("template.ply", *template)
    """
    path = Path(path)
    _check_suffix(path)
    single = np.asarray(vertices).dtype.itemsize <= 4
    vertices, faces = check_mesh(vertices, faces)
    vertices = vertices.astype(np.float32) if single else vertices
    suffix = path.suffix.lower()
    if features and suffix != ".ply":
        raise ValueError(f"Expected features to a PLY file (got {path.name})")
    if suffix == ".stl":
        rounded = in_single_precision(f"vertices to {path.name}", vertices)
        if len(np.unique(rounded, axis=0)) < len(np.unique(vertices, axis=0)):
            raise ValueError(
                f"Expected vertices that are apart in single precision to {path.name} (got some "
                f"that become one): another format has double precision"
            )
    if suffix == ".ply":
        columns = dict(zip("xyz", vertices.T, strict=True))
        content = ply_bytes(columns | _columns(features or {}, len(vertices)), faces)
    else:
        content = {".obj": obj_bytes, ".off": off_bytes, ".stl": stl_bytes}[suffix](vertices, faces)
    write_bytes(path, content)


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

    Example:
        >>> from pyg_attnpool.mesh import check_mesh
        >>> vertices, faces = check_mesh(*template)
        >>> vertices.dtype, faces.dtype
        (dtype('float64'), dtype('int64'))
    """
    vertices, faces = check_arrays(vertices, faces)
    broken = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(broken) > 0:
        raise ValueError(
            f"Expected finite vertices (got {vertices[broken[0]].tolist()} at vertex {broken[0]})"
        )
    repeated = np.flatnonzero((faces == np.roll(faces, 1, axis=1)).any(axis=1))
    if len(repeated) > 0:
        raise ValueError(
            f"Expected faces of three different vertices "
            f"(got {faces[repeated[0]].tolist()} at face {repeated[0]}){REPAIR}"
        )
    lonely = np.flatnonzero(np.bincount(faces.ravel(), minlength=len(vertices)) == 0)
    if len(lonely) > 0:
        raise ValueError(
            f"Expected every vertex to be part of a face (got {len(lonely)} that are not, the "
            f"first is vertex {lonely[0]}){REPAIR}"
        )
    _check_manifold(faces, len(vertices))
    return vertices, faces


def in_single_precision(name: str, vertices: ndarray) -> ndarray:
    r"""Coordinates :obj:`[N, 3]` in single precision (float32), where that moves no vertex by more
    than a hundred-thousandth of the size of the mesh.

    Args:
        name (str): What the error calls them.
        vertices (numpy.ndarray): The coordinates.

    Raises:
        ValueError: If they are too far from the origin.
    """
    # Too large a number becomes infinite, which is as far as can be. What is not finite before is
    # not for this check to judge.
    with np.errstate(over="ignore", invalid="ignore"):
        single = vertices.astype(np.float32)
        away, size = np.abs(vertices - single).max(), np.ptp(vertices, axis=0).max()
    if away > ROUNDING * size > 0:
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        near = [float(f"{x:.5g}") for x in low / 2 + high / 2]
        raise ValueError(
            f"Expected {name} near the origin, as single precision would move them by up to "
            f"{away:.2g} on a mesh of size {size:.2g} (got coordinates around {near}): subtract "
            f"these first"
        )
    return single


def as_template(template: str | Path | tuple[ndarray, ndarray]) -> tuple[ndarray, ndarray]:
    r"""Vertices and faces of a template, which is a mesh file or two arrays, in double precision
    and long integers.

    Raises:
        TypeError: If it is something else.
        ValueError: If shapes are wrong, or a face has a vertex that is not there.
    """
    if isinstance(template, str | Path):
        return read_mesh(Path(template).expanduser())
    try:
        vertices, faces = template
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"Expected a template as a mesh file or as vertices and faces (got "
            f"{type(template).__name__})"
        ) from e
    return check_arrays(vertices, faces)


def check_arrays(vertices: ndarray, faces: ndarray) -> tuple[ndarray, ndarray]:
    r"""Checks types, shapes and range of vertices and faces, before the mesh that they make up."""
    if np.ma.is_masked(vertices) or np.ma.is_masked(faces):
        raise TypeError("Expected arrays without a mask (got masked entries)")
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
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"Expected faces of vertices 0 to {len(vertices) - 1} "
            f"(got {faces.min()} to {faces.max()})"
        )
    return vertices, faces


def properties(features: Collection[str]) -> list[str]:
    r"""The properties of a PLY file that features are made of: three of :obj:`"color"` and
    :obj:`"normal"`, and one of each other.

    Raises:
        TypeError: If the names are no strings.
        ValueError: If a name has spaces, is that of a coordinate, or stands twice.
    """
    if isinstance(features, str) or not all(isinstance(name, str) for name in features):
        raise TypeError(f"Expected a list of names of features (got {features!r})")
    names = [name for feature in features for name in FEATURES.get(feature, (feature,))]
    for i, name in enumerate(names):
        if name in names[:i] or name in "xyz" or not re.fullmatch("[!-~]+", name):
            raise ValueError(
                f"Expected features of names of their own, without spaces (got {name!r})"
            )
    return names


def _columns(features: dict[str, ndarray], num_vertices: int) -> dict[str, ndarray]:
    # The properties of a PLY file that features make.
    columns: list[ndarray] = []
    for feature, values in features.items():
        values = np.asarray(values)
        width = len(properties([feature]))
        if values.shape != (num_vertices, width):
            raise ValueError(
                f"Expected feature '{feature}' of shape {[num_vertices, width]} "
                f"(got {list(values.shape)})"
            )
        columns.extend(values.T)
    return dict(zip(properties(features), columns, strict=True))


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
            f"(got {count.max()} at the edge of vertices {a} and {b}){REPAIR}"
        )
    if directed_count.max() > 1:
        a, b = divmod(int(directed[directed_count.argmax()]), num_vertices)
        raise ValueError(
            f"Expected faces of one orientation (got two opposite ones at the edge of vertices "
            f"{a} and {b}){REPAIR}"
        )
    # Around a vertex, every face leads from one neighbour to the next. On a manifold that is one
    # cycle or one path: as many fans as there are components among the corners of the vertex.
    halfedge, reverse = source * num_vertices + target, target * num_vertices + source
    _, inner, twin = np.intersect1d(halfedge, reverse, assume_unique=True, return_indices=True)
    # The corner at the start of a half-edge is at the end of its twin, the twin's next corner.
    following = twin - twin % 3 + (twin + 1) % 3
    fan = components(np.stack([inner, following], axis=1), faces.size)
    num_fans = int(fan.max()) + 1
    if num_fans > num_vertices:
        owner = np.zeros(num_fans, dtype=np.int64)
        owner[fan] = source
        vertex = int(np.bincount(owner).argmax())
        raise ValueError(
            f"Expected a manifold mesh, one fan of faces around a vertex "
            f"(got {np.bincount(owner).max()} at vertex {vertex}){REPAIR}"
        )


def _check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"Expected a file name ending in one of {suffixes} (got {path.name})")


def _mesh_file(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    path = Path(path)
    _check_suffix(path, suffixes)
    if path.is_dir():
        raise ValueError(f"Expected a mesh file at {path} (got a folder)")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a mesh file at {path} (got none)")
    return path


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        with np.errstate(all="ignore"):  # of numbers that are refused as not finite
            yield
    except ValueError as e:
        kind = path.suffix[1:].upper()
        raise ValueError(f"Expected a whole {kind} file in {path} (got {e})") from e


def _fans(corners: ndarray, counts: ndarray) -> ndarray:
    # Triangle k of a polygon has its corners 0, k + 1 and k + 2.
    polygon = np.repeat(np.arange(len(counts)), counts - 2)
    first = (counts.cumsum() - counts)[polygon]
    k = np.arange(len(polygon)) - ((counts - 2).cumsum() - (counts - 2))[polygon]
    return corners[np.stack([first, first + k + 1, first + k + 2], axis=1)]
