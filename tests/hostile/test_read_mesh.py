import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pyg_attnpool.mesh import check_mesh, read_mesh, write_mesh
from tests.mesh.meshes import icosphere

PLY = (
    b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
    b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
)
OBJ = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
OFF = b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
STL = (
    b"solid\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\n"
    b"endfacet\nendsolid\n"
)
FAULTS = {
    **{
        f"token-{token.decode()}.{name}": (whole.replace(b"1 0 0", token + b" 0 0", 1), place)
        for name, whole, places in (
            ("ply", PLY, ("vertex 1", "line 11")),
            ("obj", OBJ, ("vertex 1", "line 2")),
            ("off", OFF, ("vertex 1", "line 4")),
            ("stl", STL, ("corner 1 of face 0", "line 5")),
        )
        for token, place in (
            *((t, places[0]) for t in (b"nan", b"inf", b"1e999")),
            *((t, places[1]) for t in (b"x", b"1_0", b"0x1")),
        )
    },
    **{
        f"vertices-{count}.ply": (
            PLY.replace(b"vertex 3", b"vertex " + count.encode()),
            "rows of 'vertex'|line 3|lines after the header",
        )
        for count in ("1000000000", "-1", "4294967296", "4", "2", "x", "9" * 99)
    },
    **{
        f"counts-{n}-{m}.off": (OFF.replace(b"3 1 0", f"{n} {m} 0".encode(), 1), "header|line|vert")
        for n, m in ((10**9, 1), (3, 2**32), (-1, 1), (3, -1), (2, 1), (3, 2))
    },
    **{
        f"binary-{n}-{m}.off": (
            b"OFF BINARY\n" + struct.pack("<3I", n, m, 0) + bytes(90),
            "bytes|0 corners",
        )
        for n, m in ((10**9, 1), (2**32 - 1, 2**32 - 1), (3, 10**9), (3, 1))
    },
    "version.ply": (PLY.replace(b" 1.0", b""), "line 2"),
    "binary.stl": (bytes(80) + struct.pack("<I", 10**9) + bytes(100), "184 bytes"),
    "outside.obj": (OBJ.replace(b"f 1 2 3", b"f 1 2 4"), "vertex 3 of 3 vertices at face 0"),
    "zero.obj": (OBJ.replace(b"f 1 2 3", b"f 0 1 2"), "line 4"),
    "negative.obj": (OBJ.replace(b"f 1 2 3", b"f -4 1 2"), "vertex -1 of 3 vertices at face 0"),
    "word.obj": (OBJ.replace(b"v 1", b"w 1"), "line 2"),
    "edge.off": (OFF.replace(b"3 0 1 2", b"2 0 1"), "2 corners at face 0"),
    "after.off": (OFF + b"3 0 1 2\n", "line 7 after the last face"),
    "faceless.ply": (
        PLY.split(b"element face")[0] + b"end_header\n0 0 0\n1 0 0\n0 1 0\n",
        "no faces",
    ),
    "faceless.obj": (OBJ.split(b"f ")[0], "no faces"),
    "faceless.off": (b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces"),
    "faceless.stl": (b"solid\nendsolid\n", "no faces"),
    **{f"empty.{suffix}": (b"", "no |0 bytes") for suffix in ("ply", "obj", "off", "stl")},
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_refused_with_its_place(tmp_path, name):
    content, place = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=place) as error:
        read_mesh(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("cut", [3, 4, 5])
def test_binary_ply_cut_by_a_few_bytes(tmp_path, order, cut):
    kind = {"<": b"binary_little_endian", ">": b"binary_big_endian"}[order]
    body = struct.pack(f"{order}9fB3i", *range(9), 3, 0, 1, 2)
    content = PLY.split(b"0 0 0")[0].replace(b"ascii", kind) + body
    path = tmp_path / "mesh.ply"
    path.write_bytes(content)
    assert read_mesh(path)[1].tolist() == [[0, 1, 2]]
    path.write_bytes(content[:-cut])
    with pytest.raises(ValueError, match="take 37 at least|bytes left"):
        read_mesh(path)
    # A list of -3 corners, and one of 200 of which three are there.
    for length, count in ((b"char", 253), (b"uchar", 200)):
        at = len(content) - 13
        other = content[:at].replace(b"uchar", length) + bytes([count]) + content[at + 1 :]
        path.write_bytes(other)
        with pytest.raises(ValueError, match="row 0 of 'face'"):
            read_mesh(path)


def test_degenerate_face_is_read_and_named_by_its_number(tmp_path):
    path = tmp_path / "mesh.off"
    path.write_bytes(OFF.replace(b"3 1 0", b"3 2 0") + b"3 1 2 1\n")
    vertices, faces = read_mesh(path)
    assert faces.tolist() == [[0, 1, 2], [1, 2, 1]]
    with pytest.raises(ValueError, match=r"got \[1, 2, 1\] at face 1"):
        check_mesh(vertices, faces)


def test_folder_and_threads(tmp_path):
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(ValueError, match="folder.ply .got a folder"):
        read_mesh(tmp_path / "folder.ply")
    vertices, faces = icosphere(2)
    for suffix in ("ply", "obj", "off", "stl"):
        write_mesh(tmp_path / f"mesh.{suffix}", vertices, faces)
    before = os.fstat(2)
    with ThreadPoolExecutor(8) as pool:
        paths = [tmp_path / f"mesh.{s}" for s in ("ply", "obj", "off", "stl")] * 25
        for got_vertices, got_faces in pool.map(read_mesh, paths):
            np.testing.assert_allclose(got_vertices[got_faces], vertices[faces], atol=1e-7)
    assert os.fstat(2).st_ino == before.st_ino
