r"""OBJ, PLY, OFF and STL files: bytes to arrays and back, every byte accounted for.

The reader of each returns vertices :obj:`[N, 3]` (float64), the corners of all polygons one after
another, and how many corners each has; a file of points alone has no polygons. It raises a
:class:`ValueError` that names the place for whatever it cannot account for, and asks for no memory
before it knows that the file can fill it.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

Polygons = tuple[ndarray, ndarray, ndarray]

# Keywords of the format's specification: a line of any other is damage, not a remark.
OBJ_KEYWORDS = frozenset(
    b"v vt vn vp f fo l p g o s mg usemtl mtllib usemap maplib cstype deg bmat step curv curv2 "
    b"surf parm trim hole scrv sp end con bevel c_interp d_interp lod shadow_obj trace_obj ctech "
    b"stech call csh bsp bzp cdc cdp res".split()
)
OBJ_CORNER = re.compile(rb"(-?\d+)(?:/(?:-?\d+)?(?:/(?:-?\d+)?)?)?")
OFF_HEADER = re.compile(rb"\s*(?:#[^\n]*\n\s*)*(?:ST)?C?N?OFF(?:[ \t]+(BINARY)[ \t]*\r?\n)?")
PLY_TYPES = {
    name: np.dtype(code)
    for code, names in {
        "i1": "char int8",
        "u1": "uchar uint8",
        "i2": "short int16",
        "u2": "ushort uint16",
        "i4": "int int32",
        "u4": "uint uint32",
        "f4": "float float32",
        "f8": "double float64",
    }.items()
    for name in names.split()
}
STL_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
STL_LINES = [
    ([b"facet", b"normal"], 3),
    ([b"outer", b"loop"], 0),
    *[([b"vertex"], 3)] * 3,
    ([b"endloop"], 0),
    ([b"endfacet"], 0),
]
PLY_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}  # numpy's
PLY_CORNERS = ("vertex_indices", "vertex_index")
PADDING = b" \t\r\n\0"  # may follow the last row of a file


def read_obj(path: Path) -> Polygons:
    r"""Reads the vertices and the polygons of an OBJ file; textures, normals, groups, materials,
    lines and points are passed over."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    vertices: list[list[float]] = []
    corners: list[int] = []
    counts: list[int] = []
    for line, (keyword, *tokens) in _rows(content, continued=True):
        if keyword == b"v":
            if len(tokens) not in (3, 4, 6, 7):  # a weight, a colour or both may follow
                raise ValueError(f"{len(tokens)} numbers of a vertex in line {line}")
            vertices.append(_floats(tokens, line)[:3])
        elif keyword == b"f":
            for token in tokens:
                corner = OBJ_CORNER.fullmatch(token)
                number = int(corner[1]) if corner else 0
                if number == 0:
                    raise ValueError(f"{_shown(token)} for a corner in line {line}")
                corners.append(number - 1 if number > 0 else len(vertices) + number)
            counts.append(len(tokens))
        elif keyword not in OBJ_KEYWORDS:
            raise ValueError(f"{_shown(keyword)} in line {line}")
    return _polygons(vertices, corners, counts)


def read_off(path: Path) -> Polygons:
    r"""Reads an OFF file, of text or binary; colours, normals and textures are passed over."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    header = OFF_HEADER.match(content)
    if header is None:
        raise ValueError("no OFF header")
    if header[1]:
        return _binary_off(content[header.end() :])
    rows = _rows(content[header.end() :], first=1 + content.count(b"\n", 0, header.end()))
    line, tokens = next(rows, (1, []))
    if len(tokens) not in (2, 3) or not all(map(bytes.isdigit, tokens)):
        raise ValueError(f"{_shown(b' '.join(tokens))} for the counts in line {line}")
    num_vertices, num_faces = int(tokens[0]), int(tokens[1])
    vertices: list[list[float]] = []
    corners: list[int] = []
    counts: list[int] = []
    for line, tokens in rows:
        if len(vertices) < num_vertices:
            if len(tokens) < 3:
                raise ValueError(f"{len(tokens)} numbers of a vertex in line {line}")
            vertices.append(_floats(tokens, line)[:3])
        elif len(counts) < num_faces:
            count = _ints(tokens[:1], line)[0]
            if not 0 <= count < len(tokens):
                raise ValueError(f"{len(tokens) - 1} of {count} corners in line {line}")
            corners += _ints(tokens[1 : 1 + count], line)
            _floats(tokens[1 + count :], line)
            counts.append(count)
        else:
            raise ValueError(f"line {line} after the last face")
    if (len(vertices), len(counts)) != (num_vertices, num_faces):
        raise ValueError(
            f"{len(vertices)} vertices and {len(counts)} faces, and the header says "
            f"{num_vertices} and {num_faces}"
        )
    return _polygons(vertices, corners, counts)


def read_stl(path: Path) -> Polygons:
    r"""Reads an STL file, of text or binary. It lists corners, not vertices: equal corners become
    one vertex, in the order of first appearance."""
    content = path.read_bytes()
    num_faces = int.from_bytes(content[80:84], "little")
    end = 84 + STL_FACET.itemsize * num_faces
    # Binary files may start with the word that text starts with.
    if len(content) != end and content.lstrip()[:5].lower() == b"solid":
        points = _text_stl(content)
    elif len(content) < end or content[end:].strip(PADDING):
        raise ValueError(f"{len(content)} bytes, and {num_faces} faces make {end}")
    else:
        points = np.frombuffer(content, STL_FACET, num_faces, 84)["corners"].astype(np.float64)
    broken = np.argwhere(~np.isfinite(points))
    if len(broken) > 0:
        face, corner, _ = broken[0]
        raise ValueError(f"{points[face, corner].tolist()} at corner {corner} of face {face}")
    if len(points) == 0:
        raise ValueError("no faces, and a mesh has at least one face")
    points = points.reshape(-1, 3) + 0.0  # no negative zeros
    _, first, inverse = np.unique(points, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[first.argsort()] = np.arange(len(first))
    corners = rank[inverse.reshape(-1)]
    return points[np.sort(first)], corners, np.full(len(corners) // 3, 3)


def read_ply(path: Path) -> Polygons:
    r"""Reads the coordinates and the polygons of a PLY file, of text or binary in either order of
    bytes; whatever else it holds is read and passed over."""
    elements = read_ply_elements(path)
    vertex, face = elements.get("vertex", {}), elements.get("face", {})
    axes = [vertex[axis] for axis in "xyz" if isinstance(vertex.get(axis), ndarray)]
    if len(axes) < 3:
        raise ValueError(f"vertices of {list(vertex)}, without x, y and z")
    corners, counts = _listed(face, "faces")
    strips, lengths = _listed(elements.get("tristrips", {}), "triangle strips")
    if len(counts) > 0 and len(lengths) > 0:
        raise ValueError("both faces and triangle strips")
    if len(counts) == 0:
        corners, counts = _triangles_of_strips(strips, lengths)
    vertices = np.stack([axis.astype(np.float64) for axis in axes], axis=1)
    return _polygons(vertices, corners, counts)


def read_ply_elements(path: Path) -> dict[str, dict[str, Any]]:
    r"""Every element of a PLY file by its name, every property by its name: an array of one value
    for each row, or for lists their values one after another and their lengths."""
    content = path.read_bytes()
    first = re.match(rb"ply[ \t]*(\r\n|\r|\n)", content)
    end = first and re.search(rb"[\r\n]end_header[ \t]*" + first[1], content)
    if not first or not end:
        raise ValueError("no PLY header")
    lines, body = content[: end.start()].splitlines(), content[end.end() :]
    order, elements = _ply_header(lines)
    # A number takes two bytes of text at least, a figure and a space; a list may be empty.
    sizes = [sum((p.length or p.type).itemsize if order else 2 for p in e.parts) for e in elements]
    needed = sum(e.num_rows * size for e, size in zip(elements, sizes, strict=True))
    if needed > len(body) + (not order):
        raise ValueError(
            f"{len(body)} bytes after the header, and {_said(elements)} take {needed} at least"
        )
    out: dict[str, dict[str, Any]] = {}
    if order:
        at = 0
        for element in elements:
            out[element.name], at = _binary_rows(body, at, element, order)
        if body[at:].strip(PADDING):
            raise ValueError(f"{len(body) - at} bytes after the last row")
        return out
    rows = list(_rows(body.rstrip(PADDING), comments=False, first=2 + len(lines)))
    if len(rows) != sum(e.num_rows for e in elements):
        raise ValueError(f"{len(rows)} lines after the header, not {_said(elements)}")
    at = 0
    for element in elements:
        out[element.name] = _text_rows(rows[at : at + element.num_rows], element)
        at += element.num_rows
    return out


def read_xyz(path: Path) -> ndarray:
    r"""Reads the numbers :obj:`[P, C]` of a file of text with a point in every line."""
    rows = [_floats(tokens, line) for line, tokens in _rows(path.read_bytes())]
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{len(row)} numbers at point {i}, not {len(rows[0])}")
    return np.array(rows, dtype=np.float64)


def obj_bytes(vertices: ndarray, faces: ndarray) -> bytes:
    r"""An OBJ file of vertices and faces."""
    return b"".join([*_lines(b"v ", vertices), *_lines(b"f ", faces + 1)])


def off_bytes(vertices: ndarray, faces: ndarray) -> bytes:
    r"""An OFF file of text."""
    header = b"OFF\n%d %d 0\n" % (len(vertices), len(faces))
    return b"".join([header, *_lines(b"", vertices), *_lines(b"3 ", faces)])


def stl_bytes(vertices: ndarray, faces: ndarray) -> bytes:
    r"""A binary STL file, whose numbers are of single precision."""
    facets = np.zeros(len(faces), STL_FACET)
    corners = vertices[faces].astype(np.float64)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    facets["normal"] = np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
    facets["corners"] = corners
    return bytes(80) + len(faces).to_bytes(4, "little") + facets.tobytes()


def ply_bytes(columns: dict[str, ndarray], faces: ndarray) -> bytes:
    r"""A binary PLY file of vertices by their properties, :obj:`"x"`, :obj:`"y"`, :obj:`"z"` and
    others, as :obj:`float` or :obj:`uchar` where they are, else :obj:`double`, and of faces."""
    kinds = {np.dtype(np.float32): "f4", np.dtype(np.uint8): "u1"}
    fields = {name: kinds.get(v.dtype, "f8") for name, v in columns.items()}
    names = {"f4": "float", "u1": "uchar", "f8": "double"}
    header = [
        "ply\nformat binary_little_endian 1.0",
        f"element vertex {len(columns['x'])}",
        *(f"property {names[kind]} {name}" for name, kind in fields.items()),
        f"element face {len(faces)}",
        "property list uchar int vertex_indices\nend_header\n",
    ]
    vertex = np.empty(len(columns["x"]), [(name, "<" + kind) for name, kind in fields.items()])
    for name, values in columns.items():
        vertex[name] = values
    face = np.empty(len(faces), [("length", "u1"), ("corners", "<i4", 3)])
    face["length"], face["corners"] = 3, faces
    return "\n".join(header).encode() + vertex.tobytes() + face.tobytes()


def _lines(start: bytes, rows: ndarray) -> Iterator[bytes]:
    # The fewest digits that give the same number again.
    text = "{:.9g} {:.9g} {:.9g}\n" if rows.dtype == np.float32 else "{!r} {!r} {!r}\n"
    return (start + text.format(*row).encode() for row in rows.tolist())


class _Property(NamedTuple):
    name: str
    type: np.dtype
    length: np.dtype | None  # of a list


class _Element(NamedTuple):
    name: str
    num_rows: int
    parts: list[_Property]


def _ply_header(lines: list[bytes]) -> tuple[str, list[_Element]]:
    # The order of bytes, none for text, and the elements.
    order: str | None = None
    elements: list[_Element] = []
    names: set[str] = set()  # of elements
    taken: set[str] = set()  # of the properties of the last one
    for number, line in enumerate(lines[1:], start=2):
        keyword, *words = (w.decode("utf-8", "replace") for w in line.split() or [b""])
        if keyword in ("", "comment", "obj_info"):
            continue
        try:
            if keyword == "format" and order is None:
                kind, version = words
                order = {"1.0": PLY_ORDER}[version][kind]
            elif keyword == "element" and order is not None:
                name, count = words
                if not re.fullmatch("[0-9]+", count) or name in names:
                    raise ValueError
                names.add(name)
                taken = set()
                elements.append(_Element(name, int(count), []))
            elif keyword == "property":
                *types, name = words
                dtypes = [PLY_TYPES[t] for t in types if t != "list"]
                listed, parts = types[0] == "list", elements[-1].parts
                if len(dtypes) != 1 + listed or len(types) != 1 + 2 * listed:
                    raise ValueError
                if name in taken or (listed and dtypes[0].kind == "f"):
                    raise ValueError
                taken.add(name)
                parts.append(_Property(name, dtypes[-1], dtypes[0] if listed else None))
            else:
                raise ValueError
        except (ValueError, KeyError, IndexError):
            raise ValueError(f"{_shown(line)} in line {number}") from None
    if order is None or not all(e.parts or e.num_rows == 0 for e in elements):
        raise ValueError("a header without format, or with an element without properties")
    return order, elements


def _said(elements: list[_Element]) -> str:
    return " and ".join(f"{e.num_rows} rows of {e.name!r}" for e in elements)


def _binary_rows(body: bytes, at: int, element: _Element, order: Any) -> tuple[dict[str, Any], int]:
    # The properties of an element whose rows start at a byte, and the byte after the last row.
    parts = [
        _Property(p.name, p.type.newbyteorder(order), p.length and p.length.newbyteorder(order))
        for p in element.parts
    ]
    values: list[list] = [[] for _ in parts]
    lengths: list[list[int]] = [[] for _ in parts]
    for row in range(element.num_rows):
        start = at
        for i, part in enumerate(parts):
            length = 1
            if part.length is not None:
                length = int(_piece(body, at, part.length, 1, row, element)[0])
                at += part.length.itemsize
            values[i].append(_piece(body, at, part.type, length, row, element))
            lengths[i].append(length)
            at += length * part.type.itemsize
        if row == 0:
            # Rows like the first, as those of triangles are, make one array.
            table = _binary_table(body, start, element.num_rows, parts, [n for (n,) in lengths])
            if table is not None:
                values = [[table[part.name].reshape(-1)] for part in parts]
                lengths = [n * element.num_rows for n in lengths]
                at = start + table.nbytes
                break
    return _columns(parts, values, lengths), at


def _binary_table(
    body: bytes, at: int, count: int, parts: list[_Property], lengths: list[int]
) -> ndarray | None:
    # All rows of an element at once, where each list has the length given.
    fields: list[tuple] = []
    for part, length in zip(parts, lengths, strict=True):
        if part.length is not None:
            fields.append((f"{part.name} length", part.length))  # a name has no space
        fields.append((part.name, part.type, (length,)))
    row = np.dtype(fields)
    if len(body) - at < count * row.itemsize:
        return None
    table = np.frombuffer(body, row, count, at)
    same = (
        part.length is None or (table[f"{part.name} length"] == length).all()
        for part, length in zip(parts, lengths, strict=True)
    )
    return table if all(same) else None


def _piece(
    body: bytes, at: int, kind: np.dtype, count: int, row: int, element: _Element
) -> ndarray:
    if count < 0 or at + count * kind.itemsize > len(body):
        raise ValueError(
            f"{count} values in row {row} of {element.name!r}, and {len(body) - at} bytes left"
        )
    return np.frombuffer(body, kind, count, at)


def _text_rows(rows: list[tuple[int, list[bytes]]], element: _Element) -> dict[str, Any]:
    values: list[list] = [[] for _ in element.parts]
    lengths: list[list[int]] = [[] for _ in element.parts]
    for line, tokens in rows:
        at = 0
        for i, part in enumerate(element.parts):
            length = 1
            if part.length is not None:
                length = sum(_ints(tokens[at : at + 1], line))
                at += 1
            if not 0 <= length <= len(tokens) - at:
                raise ValueError(f"{len(tokens) - at} of {length} values in line {line}")
            read = _floats if part.type.kind == "f" else _ints
            values[i] += read(tokens[at : at + length], line)
            lengths[i].append(length)
            at += length
        if at != len(tokens):
            raise ValueError(f"{len(tokens)} values in place of {at} in line {line}")
    for part, found in zip(element.parts, values, strict=True):
        if part.type.kind != "f" and found:
            limits = np.iinfo(part.type)
            if min(found) < limits.min or max(found) > limits.max:
                raise ValueError(f"{min(found)} to {max(found)} of {part.name!r} as {part.type}")
    arrays = [[np.array(v, dtype=p.type)] for p, v in zip(element.parts, values, strict=True)]
    return _columns(element.parts, arrays, lengths)


def _columns(parts: list[_Property], values: list, lengths: list) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part, pieces, length in zip(parts, values, lengths, strict=True):
        column = np.concatenate(pieces) if pieces else np.empty(0, part.type)
        out[part.name] = column if part.length is None else (column, np.array(length, np.int64))
    return out


def _binary_off(body: bytes) -> Polygons:
    # Geomview's files are big-endian and give the number of a face's colours, OpenMesh's are
    # little-endian and do not: the one that ends where the file ends is right.
    for order, coloured in ((">", True), ("<", False)):
        with suppress(IndexError):
            integers = np.frombuffer(body, order + "u4", len(body) // 4)
            num_vertices, num_faces, _ = integers[:3].tolist() + [0] * (3 - len(integers[:3]))
            at = 3 + 3 * num_vertices
            if at + (1 + coloured) * num_faces > len(integers):
                continue
            corners, counts = [], []
            for _ in range(num_faces):
                counts.append(int(integers[at]))
                corners.append(integers[at + 1 : at + 1 + counts[-1]])
                at += 1 + counts[-1]
                if coloured:
                    at += 1 + int(integers[at])
            if num_faces > 0 and at <= len(integers) and not body[4 * at :].strip(PADDING):
                vertices = np.frombuffer(body, order + "f4", 3 * num_vertices, 12)
                return _polygons(vertices.reshape(-1, 3), np.concatenate(corners), counts)
    raise ValueError(f"{len(body)} bytes after the header, which its counts do not make")


def _text_stl(content: bytes) -> ndarray:
    # Solids one after another; the numbers of normals are read and passed over.
    points: list[list[float]] = []
    step = None  # the line of a facet that comes next, none outside of a solid
    for line, tokens in _rows(content, comments=False):
        keyword = tokens[0].lower()
        if (step, keyword) == (None, b"solid"):
            step = 0
        elif (step, keyword) == (0, b"endsolid"):
            step = None
        else:
            words, num_numbers = STL_LINES[step or 0]
            start, numbers = tokens[: len(words)], tokens[len(words) :]
            if step is None or [t.lower() for t in start] != words or len(numbers) != num_numbers:
                expected = "solid" if step is None else b" ".join(words).decode()
                raise ValueError(f"{_shown(b' '.join(tokens))} for '{expected}' in line {line}")
            values = _floats(numbers, line)
            if keyword == b"vertex":
                points.append(values)
            step = (step + 1) % len(STL_LINES)
    if step is not None:
        raise ValueError("no 'endsolid'")
    return np.array(points, dtype=np.float64).reshape(-1, 3, 3)


def _rows(
    content: bytes, continued: bool = False, comments: bool = True, first: int = 1
) -> Iterator[tuple[int, list[bytes]]]:
    # The words of every line that has any, and its number.
    before: list[bytes] = []
    for number, line in enumerate(content.splitlines(), start=first):
        if comments:
            line = line.split(b"#", 1)[0]
        if continued and line.endswith(b"\\"):
            before += line[:-1].split()
            continue
        words = before + line.split()
        before = []
        if words:
            yield number, words
    if before:
        yield number, before


def _floats(tokens: list[bytes], line: int) -> list[float]:
    text = b" ".join(tokens)
    try:
        if b"_" in text:  # which Python reads
            raise ValueError
        return list(map(float, tokens))
    except ValueError:
        raise ValueError(f"{_shown(text)} for numbers in line {line}") from None


def _ints(tokens: list[bytes], line: int) -> list[int]:
    for token in tokens:
        if not token.removeprefix(b"-").isdigit():
            raise ValueError(f"{_shown(token)} for an integer in line {line}")
    return list(map(int, tokens))


def _polygons(vertices: Any, corners: Any, counts: Any) -> Polygons:
    # What every file must hold: finite coordinates, and polygons, if any, of three of its vertices
    # or more.
    vertices = np.asarray(vertices, dtype=np.float64).reshape(-1, 3)
    broken = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(broken) > 0:
        raise ValueError(f"{vertices[broken[0]].tolist()} at vertex {broken[0]}")
    counts = np.asarray(counts, dtype=np.int64)
    if len(counts) > 0 and counts.min() < 3:
        face = int(counts.argmin())
        raise ValueError(f"{counts[face]} corners at face {face}")
    corners = np.asarray(corners, dtype=None if len(counts) else np.int64)
    if corners.dtype.kind not in "iu":
        raise ValueError(f"vertices of faces as {corners.dtype}")
    outside = np.flatnonzero((corners < 0) | (corners >= len(vertices)))
    if len(outside) > 0:
        face = int(np.searchsorted(counts.cumsum(), outside[0], side="right"))
        raise ValueError(
            f"vertex {corners[outside[0]]} of {len(vertices)} vertices at face {face}, counted "
            f"from 0"
        )
    return vertices, corners.astype(np.int64), counts


def _listed(element: dict[str, Any], what: str) -> tuple[ndarray, ndarray]:
    # The vertices of faces or strips one after another, and how many each has.
    lists = [element[name] for name in PLY_CORNERS if isinstance(element.get(name), tuple)]
    if len(lists) != 1 and element:
        raise ValueError(f"{what} of {list(element)} without one list of vertices")
    return lists[0] if lists else (np.empty(0, np.int64),) * 2


def _triangles_of_strips(corners: ndarray, counts: ndarray) -> tuple[ndarray, ndarray]:
    # A strip goes on by one vertex a triangle, up to the end of its row or to -1: every second one
    # lies the other way round. Vertices that are repeated to join strips make no triangle.
    if corners.dtype.kind not in "iu":
        raise ValueError(f"vertices of triangle strips as {corners.dtype}")
    corners = np.insert(corners.astype(np.int64), counts.cumsum(), -1)
    if corners.min(initial=0) < -1:
        raise ValueError(f"vertex {corners.min()} in a triangle strip")
    place = np.arange(len(corners))
    start = np.maximum.accumulate(np.where(corners < 0, place + 1, 0))
    windows = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
    a, b, c = windows.T
    whole = (windows.min(axis=1, initial=0) >= 0) & (a != b) & (b != c) & (a != c)
    turned = (place[:-2] - start[:-2]) % 2 == 1
    windows[turned] = windows[turned][:, [1, 0, 2]]
    return windows[whole].reshape(-1), np.full(int(whole.sum()), 3)


def _shown(words: bytes) -> str:
    text = words[:60].decode("ascii", "backslashreplace")
    return repr(text + "..." * (len(words) > 60))
