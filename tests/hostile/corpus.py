r"""Mesh files, good and damaged, from a seed: every format in the dialects that programs write, and
the damage that disks, networks and other programs do."""

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tests.mesh.meshes import blob, join

TOKENS = [
    *[b"nan", b"inf", b"-inf", b"1e999", b"x", b"", b"1_0", b"0x1F", b"1,5", b"1.5", b"-1", b"0"],
    *[
        b"4294967296",
        b"-4294967297",
        b"99999999999999999999",
        b"1e3",
        b"--1",
        b"1.2.3",
        b"\xff\xfe",
    ],
]
COUNTS = [0, -1, 1, 1_000_000_000, 2**31 - 1, 2**32, 2**32 - 1, 2**63, 10**30]


class Case(NamedTuple):
    name: str  # of the file, which says what was done to it
    content: bytes
    mesh: tuple | None  # vertices and triangles, where nothing was damaged


def triangles(polygons):
    return [(p[0], b, c) for p in polygons for b, c in pairwise(p[1:])]


def templates(rng):
    r"""Meshes of polygons: vertices (float64) and lists of corners."""
    vertices, faces = blob(1, seed=int(rng.integers(100)), hole=bool(rng.integers(2)))
    yield vertices, faces.tolist()
    # A prism of quadrilaterals and pentagons, far from the origin.
    angle = np.arange(5) * 2 * np.pi / 5
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    prism = np.concatenate([ring, ring + np.eye(3)[2]])
    prism += [500_000.25, 5_400_000.125, 100]  # as coordinates of maps
    sides = [[i, (i + 1) % 5, 5 + (i + 1) % 5, 5 + i] for i in range(5)]
    yield prism, [[4, 3, 2, 1, 0], [5, 6, 7, 8, 9], *sides]
    # Three faces at an edge, coincident vertices and a degenerate face: no manifold.
    wild = rng.normal(size=(6, 3))
    wild[5] = wild[0]
    yield wild, [[0, 1, 2], [1, 0, 3], [0, 1, 4], [5, 4, 3], [2, 2, 1]]
    double, faces = join(blob(0, seed=1), blob(0, seed=2))
    yield double, faces.tolist()


def good(rng: np.random.Generator) -> Iterator[Case]:
    r"""Files that hold what they say."""
    for i, (vertices, polygons) in enumerate(templates(rng)):
        single = vertices.astype(np.float32).astype(np.float64)
        for name, content, exact in dialects(vertices, polygons, rng):
            kept = vertices if exact else single
            yield Case(f"good-{i}-{name}", content, (kept, triangles(polygons)))
        if all(len(p) == 3 for p in polygons):
            for name, content, kept in stls(vertices, single, polygons):
                index: dict = {}
                corners = [tuple(kept[v]) for p in polygons for v in p]
                faces = [index.setdefault(c, len(index)) for c in corners]
                mesh = np.array(list(index)), np.reshape(faces, (-1, 3)).tolist()
                yield Case(f"good-{i}-{name}", content, mesh)


def dialects(vertices, polygons, rng):
    yield from objs(vertices, polygons)
    yield from offs(vertices, polygons)
    yield from plys(vertices, polygons, rng)


def text(rows) -> bytes:
    return "".join(" ".join(map(repr, row)) + "\n" for row in rows).encode()


def objs(vertices, polygons):
    n = len(vertices)
    points = "".join("v {!r} {!r} {!r}\n".format(*v) for v in vertices.tolist())

    def faces(corner):
        return "".join("f " + " ".join(map(corner, p)) + "\n" for p in polygons)

    plain = points + faces(lambda v: f"{v + 1}")
    yield "plain.obj", plain.encode(), True
    yield "crlf.obj", plain.replace("\n", "\r\n").encode(), True
    yield "bom.obj", b"\xef\xbb\xbf" + plain.encode(), True
    everything = (
        "# caf\xe9\nmtllib none.mtl\no thing\n"
        + points.replace("\n", " 0.5 0.25 1 # red\n", 2)
        + "vt 0 0\nvt 1 0\nvn 0 0 1\n\ng part one\nusemtl none\ns off\n"
        + faces(lambda v: f"{v + 1}/{1 + v % 2}/1")
        + "l 1 2\np 1\n"
    )
    yield "textured.obj", everything.encode("latin-1"), True
    yield "normals.obj", (points + "vn 0 0 1\n" + faces(lambda v: f"{v + 1}//1")).encode(), True
    yield "negative.obj", (points + faces(lambda v: f"{v - n}")).encode(), True
    broken = plain.replace("f ", "f \\\n").replace(" ", " \\\r\n ", 3)
    yield "continued.obj", broken.encode(), True


def offs(vertices, polygons):
    counts = f"{len(vertices)} {len(polygons)} 0\n".encode()
    points = text(vertices.tolist())
    faces = text([len(p), *p] for p in polygons)
    yield "plain.off", b"OFF\n" + counts + points + faces, True
    yield "crlf.off", (b"OFF\n" + counts + points + faces).replace(b"\n", b"\r\n"), True
    yield "glued.off", b"OFF" + counts + points + faces, True
    yield "beside.off", b"OFF " + counts + points + faces, True
    comments = b"# made by hand\nOFF # really\n\n" + counts + b"# points\n" + points + b"\n" + faces
    yield "comments.off", comments, True
    colours = text([len(p), *p, 255, 0, 0] for p in polygons)
    yield (
        "colours.off",
        b"COFF\n" + counts + text([*v, 9, 9, 9, 255] for v in vertices.tolist()) + (colours),
        True,
    )
    yield (
        "normals.off",
        b"NOFF\n" + counts + text([*v, 0, 0, 1] for v in vertices.tolist()) + (faces),
        True,
    )
    for order, end in (("<", ""), (">", "0")):
        content = b"OFF BINARY\n" + struct.pack(order + "3I", len(vertices), len(polygons), 0)
        content += vertices.astype(order + "f4").tobytes()
        for p in polygons:
            content += struct.pack(f"{order}{1 + len(p) + len(end)}I", len(p), *p, *map(int, end))
        yield f"binary{'big' if end else 'little'}.off", content, False


def plys(vertices, polygons, rng):
    kinds = {"f": "float", "d": "double", "B": "uchar", "i": "int", "I": "uint", "H": "ushort"}
    choices = [
        # number, length of lists, index, further of vertices, further of faces
        ("f", "B", "i", [], []),
        ("d", "B", "i", [], []),
        ("d", "i", "I", [("red", "B"), ("green", "B"), ("blue", "B"), ("alpha", "B")], []),
        ("f", "B", "H", [("nx", "f"), ("quality", "d")], [("texcoord", "f"), ("flags", "i")]),
        ("f", "B", "i", [], [("texcoord", "f"), ("red", "B"), ("alpha", "B")]),
    ]
    for order in ("ascii", "<", ">"):
        for c, (number, length, index, on_vertex, on_face) in enumerate(choices):
            name = {"ascii": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[order]
            header = [f"ply\nformat {name} 1.0\ncomment a template\nobj_info none"]
            header += [f"element vertex {len(vertices)}"]
            header += [f"property {kinds[number]} {axis}" for axis in "xyz"]
            header += [f"property {kinds[kind]} {name}" for name, kind in on_vertex]
            header += [f"element face {len(polygons)}"]
            header += [f"property list {kinds[length]} {kinds[index]} vertex_ind{'ex' * (c % 2)}"]
            header[-1] += "" if c % 2 else "ices"
            for name, kind in on_face:
                listed = "list uchar " * (name == "texcoord")
                header += [f"property {listed}{kinds[kind]} {name}"]
            if c == 2:
                header += ["element edge 2\nproperty int vertex1\nproperty int vertex2"]
            content = "\n".join([*header, "end_header\n"]).encode()
            rows = []
            for v in vertices.astype({"f": "f4", "d": "f8"}[number]).tolist():
                rows.append([(number, x) for x in v] + [(kind, 7) for _, kind in on_vertex])
            for p in polygons:
                row = [(length, len(p)), *[(index, v) for v in p]]
                for name, kind in on_face:
                    if name == "texcoord":
                        size = 2 * len(p) * int(rng.integers(2))
                        row += [("B", size), *[(kind, 0.5)] * size]
                    else:
                        row += [(kind, 200)]
                rows.append(row)
            rows += [[("i", 0), ("i", 1)]] * (2 * (c == 2))
            if order == "ascii":
                content += text([x for _, x in row] for row in rows)
                yield f"ascii{c}crlf.ply", content.replace(b"\n", b"\r\n"), number == "d"
            else:
                for row in rows:
                    format_ = order + "".join(kind for kind, _ in row)
                    content += struct.pack(format_, *[x for _, x in row])
            short = {"ascii": "ascii", "<": "little", ">": "big"}[order]
            yield f"{short}{c}.ply", content, number == "d"


def stls(vertices, single, polygons):
    content = b"made by hand".ljust(80) + struct.pack("<I", len(polygons))
    for p in polygons:
        content += struct.pack("<12fH", 0, 0, 1, *vertices[p].ravel(), 0)
    yield "binary.stl", content, single
    yield "solid.stl", b"solid of facet" + content[14:], single
    facets = [
        "facet normal 0 0 nan\n outer loop\n"
        + "".join("  vertex {!r} {!r} {!r}\n".format(*vertices[v].tolist()) for v in p)
        + " endloop\nendfacet\n"
        for p in polygons
    ]
    whole = "solid of hands\n" + "".join(facets) + "endsolid of hands\n"
    yield "text.stl", whole.encode(), vertices
    yield "crlf.stl", whole.replace("\n", "\r\n").encode(), vertices
    two = whole.replace(
        facets[1], f"{facets[1]}endsolid\n\nSOLID two\n".replace("facet", "FACET"), 1
    )
    yield "two.stl", two.encode(), vertices


def damaged(rng: np.random.Generator, case: Case) -> Case:
    r"""The file after one damage, or two."""
    name, content = case.name.removeprefix("good-"), case.content
    what = []
    for _ in range(1 + int(rng.integers(5) == 0)):
        kind = str(rng.choice(list(DAMAGES)))
        content = DAMAGES[kind](rng, content)
        what.append(kind)
    return Case(f"{'-'.join(what)}-{name}", content, None)


def _token(rng, content):
    # Not the words of a binary file, which hold anything.
    tokens = content.split(b" ")
    tokens[int(rng.integers(len(tokens)))] = TOKENS[int(rng.integers(len(TOKENS)))]
    return b" ".join(tokens)


def _end_token(rng, content):
    words = content.split()
    word = words[int(rng.integers(len(words)))] if words else b""
    at = content.rfind(word) if rng.integers(2) else content.find(word)
    return content[:at] + TOKENS[int(rng.integers(len(TOKENS)))] + content[at + len(word) :]


def _count(rng, content):
    # The counts of a header: in words, or the four bytes of a binary one.
    count = COUNTS[int(rng.integers(len(COUNTS)))]
    if content.startswith(b"ply"):
        starts = [m for m in (b"element vertex ", b"element face ") if m in content]
        at = content.index(starts[int(rng.integers(len(starts)))]) if starts else 0
        line, _, rest = content[at:].partition(b"\n")
        old = int(line.split()[-1]) if line.split()[-1:] and line.split()[-1].isdigit() else 0
        new = count if rng.integers(2) else old + int(rng.choice([-1, 1]))
        return content[:at] + b" ".join([*line.split()[:-1], str(new).encode()]) + b"\n" + rest
    at = 80 if content[:5] in (b"made ", b"solid") else 11 + 4 * int(rng.integers(3))
    if b"BINARY" in content[:20] or at == 80:
        return content[:at] + struct.pack("<I", count % 2**32) + content[at + 4 :]
    line = content.splitlines()[:2]
    old = line[-1].split()[:1] if line else []
    return content.replace(old[0], str(count).encode(), 1) if old else content


def _cut_few(rng, content):
    return content[: -int(rng.integers(1, 6))]


def _cut(rng, content):
    return content[: int(rng.integers(len(content) + 1))]


def _flip(rng, content):
    if not content:
        return content
    out = bytearray(content)
    for at in rng.integers(len(out), size=int(rng.integers(1, 4))):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _byte(rng, content):
    at = int(rng.integers(len(content) + 1))
    middle = bytes(rng.integers(256, size=int(rng.integers(3)), dtype=np.uint8))
    return content[:at] + middle + content[at + int(rng.integers(3)) :]


def _line(rng, content):
    lines = content.split(b"\n")
    at = int(rng.integers(len(lines)))
    other = int(rng.integers(len(lines)))
    kind = int(rng.integers(3))
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    else:
        lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


def _version(rng, content):
    return content.replace(b" 1.0\n", [b"\n", b" 2.0\n", b" 1.0 x\n"][int(rng.integers(3))], 1)


def _more(rng, content):
    tail = [b"\n\n", b"\0\0\0", b"\1", b"0 0 0\n", b"3 0 1 2\n", content[-7:]]
    return content + tail[int(rng.integers(len(tail)))]


def _nothing(rng, content):
    return [b"", b"\n", b"ply\n", b"OFF\n", b"solid\n", content[:84], b"\0" * 84][
        int(rng.integers(7))
    ]


DAMAGES = {
    "token": _token,
    "word": _end_token,
    "count": _count,
    "cutfew": _cut_few,
    "cut": _cut,
    "flip": _flip,
    "byte": _byte,
    "line": _line,
    "version": _version,
    "more": _more,
    "nothing": _nothing,
}


def corpus(seed: int, num_damaged: int) -> list[Case]:
    r"""All good files, and as many damaged ones as asked for."""
    rng = np.random.default_rng(seed)
    cases = list(good(rng))
    cases += [damaged(rng, cases[int(rng.integers(len(cases)))]) for _ in range(num_damaged)]
    return [Case(f"{i:05}-{c.name}", c.content, c.mesh) for i, c in enumerate(cases)]
