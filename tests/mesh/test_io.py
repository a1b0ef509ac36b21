import numpy as np
import pytest

from pyg_attnpool.mesh import check_mesh, read_mesh, read_scan, write_mesh
from tests.mesh.meshes import blob, icosphere

SUFFIXES = ["obj", "ply", "off", "stl"]


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", ["obj", "ply", "off"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 500_000])
def test_round_trip_keeps_order_and_precision(tmp_path, suffix, kind, place):
    vertices, faces = blob(2, seed=0, hole=True)
    order = np.random.default_rng(0).permutation(len(vertices))
    vertices, faces = (place + 0.001 * vertices[order]).astype(kind), np.argsort(order)[faces]
    write_mesh(tmp_path / f"mesh.{suffix}", vertices, faces)
    got_vertices, got_faces = read_mesh(tmp_path / f"mesh.{suffix}")
    np.testing.assert_array_equal(got_faces, faces)
    np.testing.assert_array_equal(got_vertices.astype(kind), vertices)
    assert [p.name for p in tmp_path.iterdir()] == [f"mesh.{suffix}"]


def test_stl_gives_the_same_triangles(tmp_path):
    vertices, faces = blob(2, seed=1)
    write_mesh(tmp_path / "mesh.stl", vertices, faces)
    got_vertices, got_faces = read_mesh(tmp_path / "mesh.stl")
    np.testing.assert_allclose(got_vertices[got_faces], vertices[faces].astype(np.float32))
    _, first = np.unique(got_faces, return_index=True)
    assert (np.diff(first) > 0).all()  # in the order of first appearance


@pytest.mark.parametrize(
    "place, size, message",
    [
        ([5e5, 5.4e6, 100], 1, r"up to 0\.19 on a mesh of size 2 \(got coordinates around"),
        (0, 1e200, "up to inf"),
        (0, 1e-300, "up to"),
    ],
)
def test_stl_takes_no_mesh_that_it_would_change(tmp_path, place, size, message):
    vertices, faces = icosphere(1)
    vertices = size * vertices + place
    with pytest.raises(ValueError, match=rf"mesh\.stl near the origin.*{message}"):
        write_mesh(tmp_path / "mesh.stl", vertices, faces)
    write_mesh(tmp_path / "mesh.ply", vertices, faces)
    np.testing.assert_array_equal(read_mesh(tmp_path / "mesh.ply")[0], vertices)
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.ply"]


def test_stl_keeps_vertices_apart(tmp_path):
    vertices, faces = icosphere(1)
    vertices[1] = vertices[faces[0, 0]] * (1 + 1e-12)  # in double precision another place
    with pytest.raises(ValueError, match="some that become one"):
        write_mesh(tmp_path / "mesh.stl", vertices, faces)


def test_obj_with_everything(tmp_path, capfd):
    path = write(
        tmp_path / "mesh.obj",
        "# a comment\nmtllib none.mtl\no thing\n"
        "v 0 0 0 # corner\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 2 0 0\nv 2 1 0\nv 1.5 2 0\n"
        "vt 0 0\nvt 1 0\nvn 0 0 1\ng part\nusemtl none\ns off\n"
        "f 1/1/1 2/2/1 3/1/1 4/2/1\nf 2//1 5//1 6//1 3//1\nf 3/1 6/1 7/2\n",
    )
    vertices, faces = read_mesh(path)
    expected = [[0, 0], [1, 0], [1, 1], [0, 1], [2, 0], [2, 1], [1.5, 2]]
    np.testing.assert_array_equal(vertices, np.pad(expected, ((0, 0), (0, 1))))
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [1, 4, 5], [1, 5, 2], [2, 5, 6]]
    assert capfd.readouterr() == ("", "")  # no word about the missing material


def test_pentagon_becomes_a_fan(tmp_path):
    points = "1 0 0\n.3 .9 0\n-.8 .6 0\n-.8 -.6 0\n.3 -.9 0\n"
    path = write(tmp_path / "mesh.off", f"OFF\n5 1 0\n{points}5 0 1 2 3 4\n")
    assert read_mesh(path)[1].tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4]]


BAD_FILES = {
    "unknown.xyz": ("", "ending in one of"),
    "empty.obj": ("", "no faces"),
    "points.obj": ("v 0 0 0\nv 1 0 0\n", "no faces"),
    "range.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "vertex 8 of 3 vertices at face 0"),
    "nan.obj": ("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", r"\[nan, 0.0, 0.0\] at vertex 1"),
    "header.ply": ("plywood", "whole PLY file"),
    "cut.off": ("OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "whole OFF file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message) as error:
        read_mesh(write(tmp_path / name, content))
    assert name in str(error.value)


@pytest.mark.parametrize("suffix", ["ply", "off", "stl"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_cut_off_file(tmp_path, suffix, share):
    path = tmp_path / f"mesh.{suffix}"
    write_mesh(path, *icosphere(2))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="mesh."):
        read_mesh(path)


STRIPS = {
    "one row": "1\n5 0 1 2 3 4\n",
    "ended by -1": "1\n11 0 1 2 -1 2 1 3 -1 2 3 4\n",
    "several rows": "2\n4 0 1 2 3\n3 2 3 4\n",
    "joined by repeated vertices": "1\n8 0 1 2 2 2 1 3 4\n",
}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("rows", STRIPS)
def test_triangle_strips_of_ply_files(tmp_path, rows, binary):
    count, *lists = STRIPS[rows].splitlines()
    last = [3, 1, 4] if rows == "joined by repeated vertices" else [2, 3, 4]
    kind = "binary_little_endian" if binary else "ascii"
    header = (
        f"ply\nformat {kind} 1.0\nelement vertex 5\nproperty float x\nproperty float y\n"
        f"property float z\nelement tristrips {count}\nproperty list int int vertex_indices\n"
        f"end_header\n"
    )
    vertices = np.random.default_rng(0).random((5, 3), dtype=np.float32)
    if binary:
        body = vertices.tobytes()
        body += b"".join(np.array(row.split(), dtype="<i4").tobytes() for row in lists)
    else:
        body = "\n".join([*(" ".join(map(repr, v.tolist())) for v in vertices), *lists]).encode()
    (tmp_path / "strips.ply").write_bytes(header.encode() + body)
    found, faces = read_mesh(tmp_path / "strips.ply")
    np.testing.assert_array_equal(found, vertices)
    assert faces.tolist() == [[0, 1, 2], [2, 1, 3], last]


@pytest.mark.parametrize(
    "more,message",
    [
        ("element tristrips 1\nproperty list int int vertex_indices\n|4 0 1 -2 2", "vertex -2"),
        ("element tristrips 1\nproperty list int int vertex_indices\n|3 0 1 7", "vertex 7"),
        ("element tristrips 1\nproperty list int int corners\n|3 0 1 2", "strips of"),
        (
            "element face 1\nproperty list int int vertex_indices\nelement tristrips 1\n"
            "property list int int vertex_indices\n|3 0 1 2\n3 0 1 2",
            "both faces and",
        ),
    ],
)
def test_bad_triangle_strips_are_refused(tmp_path, more, message):
    header, rows = more.split("|")
    text = PLY.format(more=header) + "0 0 0\n1 0 0\n0 1 0\n" + rows + "\n"
    (tmp_path / "strips.ply").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mesh(tmp_path / "strips.ply")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ply"):
        read_mesh(tmp_path / "none.ply")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "mesh.ply"
    vertices, faces = icosphere(1)
    write_mesh(path, vertices, faces)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="finite"):
        write_mesh(path, vertices * np.nan, faces)
    assert path.read_bytes() == before


POINTS = np.random.default_rng(0).normal(size=(6, 3))
BAD_MESHES = {
    "three faces": ([[0, 1, 2], [1, 0, 3], [0, 1, 4], [0, 4, 5]], "got 3 .* vertices 0 and 1"),
    "orientation": ([[0, 1, 2], [0, 1, 3], [2, 4, 5]], "opposite .* vertices 0 and 1"),
    "two fans": ([[0, 1, 2], [3, 2, 4], [4, 5, 3]], "got 2 at vertex 2"),
    "degenerate": ([[0, 1, 2], [3, 4, 3], [1, 5, 2]], r"got \[3, 4, 3\] at face 1"),
    "range": ([[0, 1, 6], [2, 3, 4]], "0 to 5 .got 0 to 6"),
    "negative": ([[0, 1, -1], [2, 3, 4]], "0 to 5 .got -1 to 4"),
    "lonely": ([[0, 1, 2], [2, 1, 3]], "got 2 that are not, the first is vertex 4"),
    "empty": (np.empty((0, 3), int), "at least one face"),
    "quads": ([[0, 1, 2, 3], [2, 3, 4, 5]], r"\[F, 3\]"),
}


@pytest.mark.parametrize("name", BAD_MESHES)
def test_bad_mesh(name):
    faces, message = BAD_MESHES[name]
    with pytest.raises(ValueError, match=message):
        check_mesh(POINTS, np.array(faces))


def test_bad_types():
    with pytest.raises(TypeError, match="floating point vertices .got int64"):
        check_mesh(np.zeros((3, 3), dtype=np.int64), np.array([[0, 1, 2]]))
    with pytest.raises(TypeError, match="integers .got float64"):
        check_mesh(np.zeros((3, 3)), np.array([[0.0, 1, 2]]))
    vertices = POINTS[:3].copy()
    vertices[1, 2] = np.inf
    with pytest.raises(ValueError, match="at vertex 1"):
        check_mesh(vertices, np.array([[0, 1, 2]]))


PLY = """ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
{more}end_header
"""
CLOUD = [[0.0, 1.5, -2.0], [3.0, 0.25, 1.0], [1.0, 2.0, 0.5]]
NORMALS = [[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [0.6, 0.8, 0.0]]


def lines(rows, start=""):
    return "".join(f"{start}{' '.join(map(str, row))}\n" for row in rows)


BOTH = lines([p + n for p, n in zip(CLOUD, NORMALS, strict=True)])
DIRECTION = "".join(f"property float n{axis}\n" for axis in "xyz")
FILES = {
    "a.ply": (PLY.format(more="") + lines(CLOUD), False),
    "b.ply": (PLY.format(more=DIRECTION) + BOTH, True),
    "c.ply": (
        PLY.format(more="element face 0\nproperty list uchar int vertex_indices\n") + lines(CLOUD),
        False,
    ),
    "d.obj": (lines(CLOUD, "v "), False),
    "e.off": ("OFF\n3 0 0\n" + lines(CLOUD), False),
    "f.xyz": ("# a remark\n" + lines(CLOUD), False),
    "g.XYZ": (BOTH, True),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_points_alone_are_clouds(tmp_path, name):
    text, oriented = FILES[name]
    path = write(tmp_path / name, text)
    points, faces, normals = read_scan(path)
    np.testing.assert_array_equal(points, CLOUD)
    assert faces is None and (normals is not None) == oriented
    if oriented:
        np.testing.assert_allclose(normals, NORMALS, atol=1e-7)
    with pytest.raises(ValueError, match=rf"{name}.*no faces|ending in one of .*{name}"):
        read_mesh(path)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16])
def test_arrays_are_clouds(tmp_path, kind):
    x = np.concatenate([2 * np.array(CLOUD), NORMALS], axis=1).astype(kind)
    np.save(tmp_path / "a.npy", x[:, :3])
    points, faces, normals = read_scan(tmp_path / "a.npy")
    np.testing.assert_array_equal(points, x[:, :3].astype(np.float64))
    assert points.dtype == np.float64 and faces is None and normals is None
    if kind is not np.int16:
        np.save(tmp_path / "b.npy", x)
        np.testing.assert_allclose(read_scan(tmp_path / "b.npy")[2], NORMALS, atol=1e-7)


def test_a_scan_with_faces_is_a_mesh(tmp_path):
    vertices, faces = blob(2, seed=0, hole=True)
    for suffix in ("obj", "ply", "off"):
        write_mesh(tmp_path / f"mesh.{suffix}", vertices, faces)
        found = read_scan(tmp_path / f"mesh.{suffix}")
        np.testing.assert_array_equal(found[0], vertices)
        np.testing.assert_array_equal(found[1], faces)
        assert found[2] is None


BAD_CLOUDS = {
    "a.xyz": ("1 2 3\n1 2\n", "2 numbers at point 1"),
    "b.xyz": ("1 2 3\n1 two 3\n", "line 2"),
    "c.xyz": ("", "no points|shape"),
    "d.xyz": ("1 2 3 255 0 0\n", "unit normal of point 0"),
    "e.xyz": ("1 2 nan\n", "point 0"),
    "f.xyz": ("1 2\n", "shape"),
    "g.npy": ("not an array", "g.npy"),
    "h.obj": ("v 1 2 3\nf 1 1\n", "corners"),
    "i.ply": (PLY.format(more="") + lines(CLOUD[:2]), "lines"),
    "j.txt": ("1 2 3\n", "ending in"),
    "k.npy": (np.zeros((4, 2)), "shape"),
    "l.npy": (np.array(["a", "b"]), "not numbers"),
    "m.npy": (np.array([{}], dtype=object), "m.npy"),
    "n.npy": (np.full((4, 3), np.inf), "point 0"),
}


@pytest.mark.parametrize("name", BAD_CLOUDS)
def test_bad_cloud_is_named(tmp_path, name):
    content, message = BAD_CLOUDS[name]
    if isinstance(content, str):
        write(tmp_path / name, content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as error:
        read_scan(tmp_path / name)
    assert name in str(error.value)
