r"""An independent reader of mesh files, the truth for the fuzzer: one token and one field at a
time, in plain Python, without numpy and without a shortcut. What it does not know is damage."""

import math
import re
import struct
from itertools import pairwise

NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.I)
INTEGER = re.compile(rb"-?\d+")
OBJ_IGNORED = (
    b"vt vn vp fo l p g o s mg usemtl mtllib usemap maplib cstype deg bmat step curv curv2 surf "
    b"parm trim hole scrv sp end con bevel c_interp d_interp lod shadow_obj trace_obj ctech "
    b"stech call csh bsp bzp cdc cdp res"
).split()
PLY_FORMATS = {
    **dict.fromkeys(["char", "int8"], "b"),
    **dict.fromkeys(["uchar", "uint8"], "B"),
    **dict.fromkeys(["short", "int16"], "h"),
    **dict.fromkeys(["ushort", "uint16"], "H"),
    **dict.fromkeys(["int", "int32"], "i"),
    **dict.fromkeys(["uint", "uint32"], "I"),
    **dict.fromkeys(["float", "float32"], "f"),
    **dict.fromkeys(["double", "float64"], "d"),
}
PADDING = b" \t\r\n\0"


class Damaged(Exception):
    r"""The file is not what its format says."""


def need(condition):
    if not condition:
        raise Damaged


def number(token):
    need(NUMBER.fullmatch(token))
    return float(token)


def integer(token):
    need(INTEGER.fullmatch(token) and len(token) < 20)
    return int(token)


def strict(name, content):
    r"""Vertices and triangles of a file as lists of tuples, or :obj:`None` for a damaged one."""
    try:
        vertices, polygons = {"obj": obj, "ply": ply, "off": off, "stl": stl}[name[-3:]](content)
        need(polygons)
        for vertex in vertices:
            need(all(map(math.isfinite, vertex)))
        triangles = []
        for polygon in polygons:
            need(len(polygon) >= 3 and all(0 <= v < len(vertices) for v in polygon))
            for b, c in pairwise(polygon[1:]):
                triangles.append((polygon[0], b, c))
        return vertices, triangles
    except (Damaged, struct.error):
        return None


def words(content, comment=True):
    rows = []
    for line in content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        if comment and b"#" in line:
            line = line[: line.index(b"#")]
        rows.append(line.split())
    return rows


def obj(content):
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    joined, start = [], b""
    for line in content.split(b"\n"):
        if b"#" in line:
            line = line[: line.index(b"#")]
        if line.endswith(b"\\"):
            start += line[:-1] + b" "
        else:
            joined.append(start + line)
            start = b""
    joined.append(start)
    vertices, polygons = [], []
    for line in joined:
        if not line.split():
            continue
        keyword, *tokens = line.split()
        if keyword == b"v":
            need(len(tokens) in (3, 4, 6, 7))
            vertices.append(tuple(list(map(number, tokens))[:3]))
        elif keyword == b"f":
            polygon = []
            for token in tokens:
                parts = token.split(b"/")
                need(len(parts) <= 3)
                for part in parts[1:]:
                    need(part == b"" or INTEGER.fullmatch(part))
                v = integer(parts[0])
                need(v != 0)
                polygon.append(v - 1 if v > 0 else len(vertices) + v)
            polygons.append(polygon)
        else:
            need(keyword in OBJ_IGNORED)
    return vertices, polygons


def off(content):
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    binary = re.match(rb"\s*OFF[ \t]+BINARY[ \t]*\r?\n", content)
    if binary:
        results = []
        for order, colours in (("<", 0), (">", 1)):
            try:
                results.append(binary_off(content[binary.end() :], order, colours))
            except (Damaged, struct.error):
                pass
        need(results)
        return results[0]
    rows = [row for row in words(content) if row]
    need(rows)
    header = re.fullmatch(rb"(?:ST)?C?N?OFF(\d*)", rows[0][0])
    need(header)
    rows[0] = ([header[1]] if header[1] else []) + rows[0][1:]
    if not rows[0]:
        rows = rows[1:]
    need(rows and len(rows[0]) in (2, 3) and all(re.fullmatch(rb"\d+", t) for t in rows[0]))
    n, m = integer(rows[0][0]), integer(rows[0][1])
    need(len(rows) == 1 + n + m)
    vertices, polygons = [], []
    for row in rows[1 : 1 + n]:
        need(len(row) >= 3)
        vertices.append(tuple(list(map(number, row))[:3]))
    for row in rows[1 + n :]:
        k = integer(row[0])
        need(0 <= k < len(row))
        polygons.append([integer(t) for t in row[1 : 1 + k]])
        for t in row[1 + k :]:
            number(t)
    return vertices, polygons


def binary_off(body, order, colours):
    n, m, _ = struct.unpack_from(order + "III", body, 0)
    need(n <= len(body) and m <= len(body))
    at = 12
    vertices, polygons = [], []
    for _ in range(n):
        vertices.append(struct.unpack_from(order + "fff", body, at))
        at += 12
    for _ in range(m):
        (k,) = struct.unpack_from(order + "I", body, at)
        need(4 * k <= len(body))
        polygons.append(list(struct.unpack_from(f"{order}{k}I", body, at + 4)))
        at += 4 + 4 * k
        if colours:
            (k,) = struct.unpack_from(order + "I", body, at)
            need(4 * k <= len(body))
            at += 4 + 4 * k
    need(at <= len(body) and body[at:].strip(PADDING) == b"")
    return vertices, polygons


def stl(content):
    size = struct.unpack_from("<I", content, 80)[0] if len(content) >= 84 else None
    corners = []
    if content.lstrip()[:5].lower() == b"solid" and (
        size is None or len(content) != 84 + 50 * size
    ):
        tokens = iter([row for row in words(content, comment=False) if row])
        for row in tokens:
            need(row[0].lower() == b"solid")
            while True:
                row = next(tokens, [b""])
                if row[0].lower() == b"endsolid":
                    break
                need([t.lower() for t in row[:2]] == [b"facet", b"normal"] and len(row) == 5)
                for t in row[2:]:
                    number(t)
                need([t.lower() for t in next(tokens, [])] == [b"outer", b"loop"])
                for _ in range(3):
                    row = next(tokens, [b""])
                    need(row[0].lower() == b"vertex" and len(row) == 4)
                    corners.append(tuple(map(number, row[1:])))
                need([t.lower() for t in next(tokens, [])] == [b"endloop"])
                need([t.lower() for t in next(tokens, [])] == [b"endfacet"])
    else:
        need(size is not None and 84 + 50 * size <= len(content))
        need(content[84 + 50 * size :].strip(PADDING) == b"")
        for face in range(size):
            for corner in range(3):
                at = 84 + 50 * face + 12 + 12 * corner
                corners.append(struct.unpack_from("<fff", content, at))
    vertices, index, polygons = [], {}, []
    for corner in corners:
        if corner not in index:
            index[corner] = len(vertices)
            vertices.append(corner)
    for i in range(0, len(corners), 3):
        polygons.append([index[c] for c in corners[i : i + 3]])
    return vertices, polygons


def ply(content):
    newline = next((n for n in (b"\r\n", b"\r", b"\n") if content.startswith(b"ply" + n)), None)
    need(newline)
    end = re.search(rb"[\r\n]end_header[ \t]*" + newline, content)
    need(end)
    kind, elements = None, []
    for row in words(content[: end.start()], comment=False)[1:]:
        if not row or row[0] in (b"comment", b"obj_info"):
            continue
        row = [t.decode("utf-8", "replace") for t in row]
        if row[0] == "format":
            need(kind is None and len(row) == 3 and row[2] == "1.0")
            need(row[1] in ("ascii", "binary_little_endian", "binary_big_endian"))
            kind = row[1]
        elif row[0] == "element":
            need(kind and len(row) == 3 and re.fullmatch("[0-9]+", row[2]))
            need(row[1] not in [e[0] for e in elements])
            elements.append((row[1], int(row[2]), []))
        else:
            need(row[0] == "property" and elements and len(row) >= 3)
            properties = elements[-1][2]
            need(row[-1] not in [p[0] for p in properties])
            if row[1] == "list":
                need(len(row) == 5 and row[2] in PLY_FORMATS and row[3] in PLY_FORMATS)
                need(PLY_FORMATS[row[2]] not in "fd")
                properties.append((row[4], PLY_FORMATS[row[2]], PLY_FORMATS[row[3]]))
            else:
                need(len(row) == 3 and row[1] in PLY_FORMATS)
                properties.append((row[2], None, PLY_FORMATS[row[1]]))
    need(kind)
    body = content[end.end() :]
    for _, count, properties in elements:
        need(count <= len(body) and (properties or count == 0))
    read = text_rows if kind == "ascii" else binary_rows
    rows = read(body, elements, "<" if kind == "binary_little_endian" else ">")
    properties = {name: [p[0] for p in parts] for name, _, parts in elements}
    lists = [p for name, _, parts in elements if name == "face" for p in parts]
    lists = [p for p in lists if p[0] in ("vertex_indices", "vertex_index") and p[1]]
    need("vertex" in rows and len(lists) == 1 and lists[0][2] not in "fd")
    for axis in "xyz":
        need(any(p[0] == axis and p[1] is None for n, _, e in elements if n == "vertex" for p in e))
    columns = [properties["vertex"].index(axis) for axis in "xyz"]
    vertices = [tuple(float(row[c]) for c in columns) for row in rows["vertex"]]
    return vertices, [list(r[properties["face"].index(lists[0][0])]) for r in rows["face"]]


def binary_rows(body, elements, order):
    at, rows = 0, {}
    for name, count, properties in elements:
        rows[name] = []
        for _ in range(count):
            row = []
            for _, length, kind in properties:
                n = 1
                if length:
                    (n,) = struct.unpack_from(order + length, body, at)
                    at += struct.calcsize(order + length)
                    need(0 <= n <= len(body))
                values = struct.unpack_from(f"{order}{n}{kind}", body, at)
                at += struct.calcsize(f"{order}{n}{kind}")
                row.append(values if length else values[0])
            rows[name].append(row)
    need(body[at:].strip(PADDING) == b"")
    return rows


def text_rows(body, elements, order):
    lines = iter([row for row in words(body.rstrip(PADDING), comment=False) if row])
    rows = {}
    for name, count, properties in elements:
        rows[name] = []
        for _ in range(count):
            tokens = iter(next(lines, []))
            row = []
            for _, length, kind in properties:
                n = integer(next(tokens, b"")) if length else 1
                need(0 <= n <= len(body))
                values = []
                for _ in range(n):
                    token = next(tokens, b"")
                    if kind in "fd":
                        try:
                            value = number(token)
                            (value,) = struct.unpack(kind, struct.pack(kind, value))
                        except OverflowError:  # too large for single precision
                            value = math.inf
                    else:
                        value = integer(token)
                        struct.pack(kind, value)  # within its limits
                    values.append(value)
                if length and kind:
                    struct.pack(length, n)
                row.append(values if length else values[0])
            need(next(tokens, None) is None)
            rows[name].append(row)
    need(next(lines, None) is None)
    return rows
