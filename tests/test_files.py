import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyg_attnpool.files import replacing, replacing_folder, whole_folder, write_bytes
from pyg_attnpool.mesh import MeshHierarchy, read_mesh, write_mesh
from tests.mesh.meshes import icosphere


@contextmanager
def full_disk(num_bytes):
    r"""No file can grow beyond a size, as on a full disk: the write fails."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def anything(folder):
    r"""Any older folder may go."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", ["ply", "obj", "off", "stl"])
def test_full_disk_leaves_the_old_mesh(tmp_path, suffix):
    path = tmp_path / f"mesh.{suffix}"
    write_mesh(path, *icosphere(1))
    before = path.read_bytes()
    for share in (0.0, 0.5, 0.99):
        with full_disk(int(share * len(before))), pytest.raises(OSError):
            write_mesh(path, *icosphere(1))
        assert path.read_bytes() == before
        assert names(tmp_path) == [path.name]
    with full_disk(10), pytest.raises(OSError):
        write_mesh(tmp_path / f"new.{suffix}", *icosphere(1))
    assert names(tmp_path) == [path.name]


def test_full_disk_leaves_the_old_hierarchy(tmp_path):
    hierarchy = MeshHierarchy.from_template(icosphere(2), factors=[4])
    hierarchy.save(tmp_path / "hierarchy.npz")
    other = MeshHierarchy.from_template(icosphere(2), factors=[2])
    with full_disk(1000), pytest.raises(OSError):
        other.save(tmp_path / "hierarchy.npz")
    assert MeshHierarchy.load(tmp_path / "hierarchy.npz").hash == hierarchy.hash
    assert names(tmp_path) == ["hierarchy.npz"]


def test_bytes_that_the_disk_lost_are_noticed(tmp_path, monkeypatch):
    write_mesh(tmp_path / "mesh.ply", *icosphere(1))
    before = (tmp_path / "mesh.ply").read_bytes()
    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: whole(self, data[:-5]))
    with pytest.raises(OSError, match="Expected [0-9]+ bytes written to .*mesh.ply"):
        write_mesh(tmp_path / "mesh.ply", *icosphere(2))
    assert (tmp_path / "mesh.ply").read_bytes() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_the_old_file_and_folder(tmp_path, error):
    write_bytes(tmp_path / "file.txt", b"old")
    with pytest.raises(error), replacing(tmp_path / "file.txt") as temporary:
        temporary.write_bytes(b"new")
        raise error
    with replacing_folder(tmp_path / "folder", anything) as temporary:
        (temporary / "a").write_bytes(b"old")
    with pytest.raises(error), replacing_folder(tmp_path / "folder", anything) as temporary:
        (temporary / "a").write_bytes(b"new")
        raise error
    assert (tmp_path / "file.txt").read_bytes() == b"old"
    assert (tmp_path / "folder" / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["file.txt", "folder"]


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    flushed, rename, replace = [], os.rename, os.replace

    def fsync(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)

    def checked(move, source, target):
        source = Path(source)
        if not source.name.endswith("folder"):  # the old one goes aside
            assert {p.stat().st_ino for p in [source, *source.rglob("*")]} <= set(flushed)
        return move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *args: checked(replace, *args))
    monkeypatch.setattr(os, "rename", lambda *args: checked(rename, *args))
    write_bytes(tmp_path / "file.txt", b"new")
    for _ in range(2):
        with replacing_folder(tmp_path / "folder", anything) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "a").write_bytes(b"new")
    assert flushed[-1] == tmp_path.stat().st_ino or os.name == "nt"


KILLED = """
import os, sys
from pyg_attnpool.files import replacing_folder
rename, count = os.rename, 0
def kill(*args):
    global count
    if count == int(sys.argv[2]):
        os._exit(9)
    count += 1
    rename(*args)
os.rename = kill
with replacing_folder(sys.argv[1], print) as temporary:
    (temporary / "a").write_text("new")
"""


@pytest.mark.parametrize("renames, content", [(0, "old"), (1, "old"), (2, "new")])
def test_kill_between_the_renames_loses_no_folder(tmp_path, renames, content):
    folder = tmp_path / "model"
    with replacing_folder(folder, anything) as temporary:
        (temporary / "a").write_text("old")
    command = [sys.executable, "-c", KILLED, str(folder), str(renames)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1])
    assert done.returncode == (9 if renames < 2 else 0)
    assert (whole_folder(folder) / "a").read_text() == content
    # The next write goes through, and nothing of the old one is found any more.
    with replacing_folder(folder, anything) as temporary:
        (temporary / "a").write_text("newer")
    assert whole_folder(folder) == folder
    assert (folder / "a").read_text() == "newer"
    assert not (tmp_path / ".model.old").exists()


def test_a_folder_that_must_stay_stays(tmp_path, monkeypatch):
    def never(folder):
        raise ValueError(f"{folder.name} stays")

    # The one aside too, which a killed write may have left.
    for name in ("folder", ".folder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("kept")
        with (
            pytest.raises(ValueError, match=f"^{name} stays"),
            replacing_folder(tmp_path / "folder", never),
        ):
            raise AssertionError("written")
        assert (tmp_path / name / "thesis.tex").read_text() == "kept"
        (tmp_path / name / "thesis.tex").unlink()
    with replacing_folder(tmp_path / "folder", never) as temporary:  # an empty one may go
        (temporary / "a").write_text("new")
    assert names(tmp_path) == ["folder"]
    (tmp_path / "folder" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "folder" / "deep")
    for path in (".", "..", "", tmp_path, "../deep", os.sep):
        with pytest.raises(ValueError, match="working folder"), replacing_folder(path, anything):
            raise AssertionError("written")
    assert names(tmp_path / "folder") == ["a", "deep"]


def test_files_in_the_way_are_named_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_bytes(b"kept")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        write_bytes(tmp_path / "folder", b"new")
    with pytest.raises(NotADirectoryError, match="got the file"):
        with replacing_folder(tmp_path / "file", anything):
            raise AssertionError("the block runs")
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["kept"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_link_goes_on_pointing_to_the_file_behind_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_bytes(tmp_path / "elsewhere" / "file.bin", b"old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "elsewhere" / "file.bin")
    write_bytes(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "elsewhere" / "file.bin").read_bytes() == b"new"


def test_threads_write_one_file(tmp_path):
    meshes = [(v + i, f) for i, (v, f) in enumerate([icosphere(1)] * 8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda mesh: write_mesh(tmp_path / "mesh.ply", *mesh), meshes))
    got, _ = read_mesh(tmp_path / "mesh.ply")
    assert any(np.array_equal(got, vertices) for vertices, _ in meshes)
    assert names(tmp_path) == ["mesh.ply"]
