r"""Files that a disk, a network or a person has damaged: right values, a ValueError that names the
file, or made again; never another error, never a file left open."""

import gc
import io
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import CoMA, DynamicFAUST, RegisteredMeshes
from pyg_attnpool.datasets.cache import mapped_array, stored
from pyg_attnpool.datasets.sources import GENERATOR
from pyg_attnpool.files import read_arrays
from tests.hostile.damage import damaged
from tests.mesh.meshes import icosphere

TEMPLATE, FACES = icosphere(1)
MESHES = TEMPLATE + np.random.default_rng(0).normal(0, 0.05, (70, *TEMPLATE.shape))


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


class Source:
    template = TEMPLATE, FACES
    sizes = (30, 40)
    labels = {"name": [str(i) for i in range(70)]}  # noqa: RUF012

    def __init__(self):
        self.made = 0

    def blocks(self, start):
        self.made += 1
        yield from (MESHES[:30], MESHES[30:])[start:]


@pytest.mark.parametrize("mapped", [True, False])
def test_stored_meshes_are_made_again(tmp_path, mapped):
    path, source = tmp_path / "a.npz", Source()
    expected = MESHES.astype(np.float32)

    def make():
        return stored(path, {"generator": 1}, lambda: source, "Making", mapped=mapped)

    make()
    again, before = 0, open_files()
    for file in (path, path.with_suffix(".npy"))[: 1 + mapped]:
        whole = file.read_bytes()
        for content in damaged(whole, 70, seed=1):
            file.write_bytes(content)
            source.made = 0
            arrays = make()
            again += source.made
            assert np.array_equal(arrays["vertices"], expected)
            assert np.array_equal(arrays["faces"], FACES)
            assert arrays["name"].tolist() == source.labels["name"]
            assert len(list(tmp_path.iterdir())) == 1 + mapped
            del arrays
    assert open_files() == before
    # What an archive has beside its arrays may be damaged without harm; not much of it.
    assert again > 50 * (1 + mapped)


def test_meshes_of_an_archive_are_right_or_it_is_named(tmp_path):
    path = tmp_path / "scans.npz"
    refused = 0
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, vertices=MESHES.astype(np.float32), other=np.arange(3))
        for content in damaged(buffer.getvalue(), 140, seed=2):
            path.write_bytes(content)
            try:
                dataset = RegisteredMeshes(path, (TEMPLATE, FACES))
            except ValueError as e:
                assert str(path) in str(e)
                refused += 1
            else:
                assert np.array_equal(dataset.vertices.numpy(), MESHES.astype(np.float32))
    assert refused > 200


def test_an_array_with_a_damaged_header_is_named(tmp_path):
    path = tmp_path / "scans.npy"
    np.save(path, MESHES.astype(np.float32))
    whole, before = path.read_bytes(), open_files()
    for content in damaged(whole[:128], 140, seed=3):
        path.write_bytes(content + whole[128:])
        try:
            vertices = RegisteredMeshes(path, (TEMPLATE, FACES)).vertices
        except ValueError as e:
            assert str(path) in str(e)
        else:
            # The other byte order is another array, and no file can tell.
            assert vertices.shape == MESHES.shape
            assert b"<f4" not in content or np.array_equal(vertices, MESHES.astype(np.float32))
    vertices = None
    for size in range(0, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"scans\.npy"):
            mapped_array(path)
    assert open_files() == before


def test_a_hierarchy_is_right_or_it_is_named(tmp_path):
    path = tmp_path / "hierarchy.npz"
    hierarchy = MeshHierarchy.from_template(icosphere(2), factors=[4])
    hierarchy.save(path)
    whole, before, refused = path.read_bytes(), open_files(), 0
    for content in damaged(whole, 140, seed=4):
        path.write_bytes(content)
        try:
            loaded = MeshHierarchy.load(path)
        except ValueError as e:
            assert str(path) in str(e)
            refused += 1
        else:
            for level in (0, 1):
                assert np.array_equal(loaded.vertices[level], hierarchy.vertices[level])
                assert np.array_equal(loaded.faces[level], hierarchy.faces[level])
    assert refused > 100 and open_files() == before


@pytest.mark.parametrize("field", ["method", "version", "encrypted", "size"])
def test_archives_that_python_cannot_unpack(tmp_path, field):
    # zipfile has errors of their own for these: NotImplementedError, RuntimeError and others.
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    local, central = data.find(b"PK\3\4"), data.find(b"PK\1\2")
    for start, shift in ((local, 0), (central, 2)):
        place, value = {
            "version": (4 + shift, 250),
            "encrypted": (6 + shift, 1),
            "method": (8 + shift, 97),
            "size": (22 + shift, 7),
        }[field]
        struct.pack_into("<H", data, start + place, value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"whole file of arrays in .*a\.npz"):
        read_arrays(path)


def test_a_header_that_is_no_python_is_named(tmp_path):
    # NumPy's fallback for headers of Python 2 raises tokenize.TokenError or SyntaxError.
    path = tmp_path / "a.npy"
    np.save(path, MESHES.astype(np.float32))
    whole = path.read_bytes()
    for header in (b"{'descr': (((", b"{'descr': '''", b"\x00" * 20, b"[" * 118):
        path.write_bytes(whole[:10] + header.ljust(117) + b"\n" + whole[128:])
        with pytest.raises(ValueError, match=r"whole file of an array in .*a\.npy"):
            mapped_array(path)


def write_obj(path, vertices):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    path.write_text("\n".join([*lines, *(f"f {a} {b} {c}" for a, b, c in FACES + 1)]) + "\n")


def test_the_cache_of_a_folder_is_made_again(tmp_path):
    for i in range(3):
        write_obj(tmp_path / "scans" / f"{i}.obj", MESHES[i])
    expected = RegisteredMeshes(tmp_path / "scans", cache=tmp_path / "cache").vertices.clone()
    assert np.allclose(expected, MESHES[:3], atol=1e-6)
    for file in sorted((tmp_path / "cache").iterdir()):
        for content in damaged(file.read_bytes(), 21, seed=5):
            file.write_bytes(content)
            again = RegisteredMeshes(tmp_path / "scans", cache=tmp_path / "cache")
            assert np.array_equal(again.vertices, expected)


def test_coma_is_read_again_or_its_archive_named(tmp_path):
    from tests.datasets.test_coma import write_zip

    write_zip(tmp_path / "whole")
    expected = CoMA(tmp_path / "whole").vertices.clone()
    whole = (tmp_path / "whole" / "raw" / "COMA_data.zip").read_bytes()
    archive = tmp_path / "COMA" / "raw" / "COMA_data.zip"
    archive.parent.mkdir(parents=True)
    refused = 0
    for content in damaged(whole, 42, seed=6):
        archive.write_bytes(content)
        try:
            dataset = CoMA(tmp_path / "COMA")
        except ValueError as e:
            assert str(archive) in str(e)
            refused += 1
        else:
            assert np.array_equal(dataset.vertices, expected)
        shutil.rmtree(tmp_path / "COMA" / "processed", ignore_errors=True)
    assert refused > 25

    # Without the archive, what has been read of it is all there is.
    shutil.copytree(tmp_path / "whole" / "processed", tmp_path / "COMA" / "processed")
    archive.unlink()
    path = tmp_path / "COMA" / "processed" / "coma.npz"
    stored_arrays = path.read_bytes()
    for content in damaged(stored_arrays, 42, seed=7):
        path.write_bytes(content)
        try:
            assert np.array_equal(CoMA(tmp_path / "COMA").vertices, expected)
        except ValueError as e:
            assert str(path) in str(e)
    with zipfile.ZipFile(io.BytesIO(stored_arrays)) as file:
        assert "subject.npy" in file.namelist()


def test_a_stored_file_of_another_data_set_is_named(tmp_path):
    # All of it whole, but without the labels.
    stored(tmp_path / "processed" / "coma.npz", {"generator": GENERATOR}, NoLabels, "Making")
    with pytest.raises(ValueError, match=r"coma\.npz is damaged .no expression, frame, name, sub"):
        CoMA(tmp_path)


class NoLabels(Source):
    labels = {}  # noqa: RUF012


def test_registrations_are_read_or_named(tmp_path):
    # HDF5 has no checksum here: values may be others, but nothing else happens.
    pytest.importorskip("h5py")
    from tests.datasets.test_dynamic_faust import SEQUENCES, write

    write(tmp_path)
    path = tmp_path / "raw" / "registrations_m.hdf5"
    whole, num, refused = path.read_bytes(), sum(sum(s.values()) for s in SEQUENCES.values()), 0
    for content in damaged(whole, 42, seed=8):
        path.write_bytes(content)
        try:
            vertices = DynamicFAUST(tmp_path).vertices
        except ValueError as e:
            assert str(path.parent) in str(e)
            refused += 1
        else:
            assert vertices.isfinite().all() and vertices.shape == (num, *TEMPLATE.shape)
    assert refused > 20
