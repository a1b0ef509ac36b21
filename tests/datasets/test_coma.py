import os
import zipfile

import numpy as np
import pytest
import torch
import torch_geometric.datasets

from pyg_attnpool.datasets import CoMA
from pyg_attnpool.datasets.coma import EXPRESSIONS
from tests.mesh.meshes import icosphere

TEMPLATE, FACES = icosphere(1)
SUBJECTS = ("FaceTalk_170725_00137_TA", "FaceTalk_170731_00024_TA")
FRAMES = 3


def ply(vertices, faces=FACES):
    # As COMA's files are: binary, little-endian, faces as lists.
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), dtype=[("n", "u1"), ("v", "<i4", 3)])
    rows["n"], rows["v"] = 3, faces
    return header.encode() + vertices.astype("<f4").tobytes() + rows.tobytes()


def meshes():
    # By name, in sorted order.
    rng = np.random.default_rng(0)
    return {
        f"{s}/{e}/{e}.{i + 1:06d}.ply": TEMPLATE / 10 + rng.normal(0, 0.01, TEMPLATE.shape)
        for s in SUBJECTS
        for e in EXPRESSIONS
        for i in range(FRAMES)
    }


def write_folders(root, content=None):
    for name, data in (content or {n: ply(v) for n, v in meshes().items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_zip(root, content=None):
    (root / "raw").mkdir(parents=True, exist_ok=True)
    content = content or {n: ply(v) for n, v in meshes().items()}
    with zipfile.ZipFile(root / "raw" / "COMA_data.zip", "w", zipfile.ZIP_DEFLATED) as file:
        # In another order than sorted, with what a Mac puts beside it.
        for name in reversed(content):
            file.writestr(name, content[name])
        file.writestr("README.txt", "not a mesh")
        file.writestr(f"__MACOSX/{SUBJECTS[0]}/bareteeth/._bareteeth.000001.ply", b"resource fork")


def processed(root):
    folder = root / "processed"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("place", ["zip", "raw", "root"])
def test_all_meshes_in_order(tmp_path, place):
    if place == "zip":
        write_zip(tmp_path)
    else:
        write_folders(tmp_path / "raw" if place == "raw" else tmp_path)
    dataset = CoMA(tmp_path)
    expected = meshes()
    assert dataset.name == list(expected)
    np.testing.assert_array_equal(
        dataset.vertices.numpy(), np.stack(list(expected.values())).astype(np.float32)
    )
    assert dataset.subject == [name.split("/")[0] for name in expected]
    assert dataset.expression == [name.split("/")[1] for name in expected]
    assert dataset.frame == list(range(FRAMES)) * 24
    assert np.array_equal(dataset.template[1], FACES)
    assert processed(tmp_path) == ["coma.npy", "coma.npz"]
    if place == "zip":  # nothing is unpacked
        assert [p.name for p in (tmp_path / "raw").iterdir()] == ["COMA_data.zip"]


def test_read_once_and_again_when_a_file_changes(tmp_path, capsys):
    write_folders(tmp_path / "raw")
    CoMA(tmp_path)
    capsys.readouterr()
    CoMA(tmp_path)
    assert capsys.readouterr().out == ""
    name, moved = next(iter(meshes())), TEMPLATE / 5
    (tmp_path / "raw" / name).write_bytes(ply(moved))
    os.utime(tmp_path / "raw" / name, (1, 1))
    np.testing.assert_array_equal(CoMA(tmp_path)[0].pos.numpy(), moved.astype(np.float32))
    # Without the files, what has been read of them is enough.
    for file in (tmp_path / "raw").rglob("*.ply"):
        file.unlink()
    np.testing.assert_array_equal(CoMA(tmp_path)[0].pos.numpy(), moved.astype(np.float32))


def test_shares_its_folder_with_pygs_own_whose_split_is_another(tmp_path):
    content = {name: ply(vertices) for name, vertices in meshes().items()}
    for i in range(FRAMES, 95):  # PyG tests on the last 10 of every 100 frames of a sequence
        content[f"{SUBJECTS[0]}/eyebrow/eyebrow.{i + 1:06d}.ply"] = ply(TEMPLATE * (1 + i))
    write_zip(tmp_path, content)
    theirs = [torch_geometric.datasets.CoMA(str(tmp_path), train=t) for t in (True, False)]
    ours = CoMA(tmp_path)
    assert len(theirs[1]) == 5 and len(theirs[0]) + 5 == len(ours) == len(content)
    test = [i for i, frame in enumerate(ours.frame) if frame >= 90]
    assert ours[test].expression == ["eyebrow"] * 5
    train = sorted(set(range(len(ours))) - set(test))
    for part, index in zip(theirs, (train, test), strict=True):
        for data, mesh in zip(part, ours[index], strict=True):
            assert torch.equal(data.pos, mesh.pos)
            assert torch.equal(data.face, mesh.face)
            assert EXPRESSIONS[data.y] == mesh.expression
    assert ours.split().test.tolist() != test


def test_the_three_splits(tmp_path):
    write_folders(tmp_path / "raw")
    dataset = CoMA(tmp_path)  # 72 meshes: one block in proportion
    assert dataset.split().test.tolist() == list(range(8))
    assert dataset.split().val.tolist() == list(range(8, 16))
    split = dataset.split("extrapolation", expression="mouth_open")
    assert {dataset.name[i].split("/")[1] for i in split.test} == {"mouth_open"}
    assert len(split.test) == 2 * FRAMES
    split = dataset.split("identity", subject=SUBJECTS[1])
    assert split.test.tolist() == list(range(36, 72))


def drop_expression(content):
    return {name: data for name, data in content.items() if "mouth_up" not in name}


def other_topology(content):
    content[list(content)[40]] = ply(*icosphere(2))
    return content


def other_faces(content):
    content[list(content)[40]] = ply(TEMPLATE, FACES[::-1])
    return content


def nan(content):
    vertices = TEMPLATE.copy()
    vertices[3, 1] = np.nan
    content[list(content)[40]] = ply(vertices)
    return content


def cut_file(content):
    name = list(content)[40]
    content[name] = content[name][:400]
    return content


@pytest.mark.parametrize("write", [write_folders, write_zip])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_expression, rf"12 expressions of {SUBJECTS[0]} .*got none of mouth_up"),
        (other_topology, r"42 vertices in .*cheeks_in.000002.ply"),
        (other_faces, r"faces of .*cheeks_in.000002.ply"),
        (nan, r"cheeks_in.000002.ply .*got .*(?i:nan)"),
        (cut_file, r"cheeks_in.000002.ply"),
    ],
)
def test_bad_meshes_are_named_and_leave_nothing(tmp_path, write, spoil, message):
    content = spoil({name: ply(v) for name, v in meshes().items()})
    write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        CoMA(tmp_path)
    assert processed(tmp_path) == []


def test_cut_or_foreign_archives(tmp_path):
    write_zip(tmp_path)
    archive = tmp_path / "raw" / "COMA_data.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"whole archive in .*COMA_data\.zip"):
        CoMA(tmp_path)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("holiday.jpg", b"")
    with pytest.raises(ValueError, match=r"FaceTalk_\*/expression/\*\.ply in .*got none"):
        CoMA(tmp_path)
    # A bit of the content: the archive knows its checksum.
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"whole mesh .*\.ply in .*COMA_data\.zip"):
        CoMA(tmp_path)
    assert processed(tmp_path) == []


def test_without_the_data_it_says_where_to_ask(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"https://coma\.is\.tue\.mpg\.de .*COMA_data\.zip.*raw"
    ):
        CoMA(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
