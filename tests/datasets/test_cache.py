import errno
import mmap
import multiprocessing
import os
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from pyg_attnpool.datasets import cache as module
from pyg_attnpool.datasets.cache import mapped_array, stored

SIZES = [3, 3, 1, 4, 2]
SETTINGS = {"generator": 1, "seed": 5}


class Source:
    def __init__(self, fail_at=None, error=ValueError, pause=0.0):
        self.vertices = np.random.default_rng(0).random((sum(SIZES), 7, 3))
        self.template = self.vertices[0], np.array([[0, 1, 2], [2, 1, 3]])
        self.sizes = SIZES
        self.labels = {"name": [f"mesh {i}" for i in range(sum(SIZES))]}
        self.fail_at, self.error, self.pause = fail_at, error, pause
        self.started = []

    def blocks(self, start):
        self.started.append(start)
        ends = np.cumsum([0, *SIZES])
        for i in range(start, len(SIZES)):
            if i == self.fail_at:
                raise self.error("no more")
            time.sleep(self.pause)
            yield self.vertices[ends[i] : ends[i + 1]]


def make(folder, source, settings=SETTINGS, **kwargs):
    return stored(folder / "a.npz", settings, lambda: source, "Making", **kwargs)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def refuse():
    raise AssertionError("opened again")


def test_what_is_stored_is_what_the_source_has(tmp_path, capsys):
    source = Source()
    arrays = make(tmp_path, source)
    expected = source.vertices.astype(np.float32)
    assert np.array_equal(arrays["vertices"], expected)
    assert arrays["vertices"].dtype == np.float32 and arrays["vertices"].flags.c_contiguous
    assert np.array_equal(arrays["template"], source.template[0])
    assert np.array_equal(arrays["faces"], source.template[1])
    assert arrays["name"].tolist() == source.labels["name"]
    assert names(tmp_path) == ["a.npy", "a.npz"]
    # Any other program reads the vertices.
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), expected)
    assert "Made 13 meshes of 7 vertices" in capsys.readouterr().out

    again = stored(tmp_path / "a.npz", SETTINGS, refuse, "Making")
    assert np.array_equal(again["vertices"], expected)
    assert capsys.readouterr().out == ""


def test_the_file_is_mapped_and_never_written_to(tmp_path):
    arrays = make(tmp_path, Source())
    before = content(tmp_path)
    assert is_mapped(arrays["vertices"])
    arrays["vertices"][3] = 77
    assert (arrays["vertices"][3] == 77).all()
    assert content(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the memory that Linux has")
def test_more_than_memory_can_be_mapped_and_written_to(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num = 2 * memory // 12_000_000
    path = tmp_path / "a.npy"
    path.write_bytes(module._header(num, 1_000_000))
    os.truncate(path, path.stat().st_size + num * 12_000_000)  # of holes, which take no disk
    array = mapped_array(path)
    assert array.nbytes > 1.9 * memory
    array[num // 2, 0] = 5
    assert array[num // 2, :2].tolist() == [[5, 5, 5], [0, 0, 0]]
    assert (mapped_array(path)[num // 2, :2] == 0).all()


def test_mapped_to_be_written_to_where_there_are_no_private_pages(tmp_path, monkeypatch):
    # As Windows has it.
    make(tmp_path, Source())
    before = content(tmp_path)
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    array = mapped_array(tmp_path / "a.npy")
    assert is_mapped(array) and np.array_equal(array, Source().vertices.astype(np.float32))
    array[3] = 77
    assert (array[3] == 77).all() and content(tmp_path) == before


def test_files_are_closed_before_they_are_renamed(tmp_path, monkeypatch):
    # Windows renames no file that is open or mapped, and replaces none either.
    def held():
        maps = Path("/proc/self/maps").read_text()
        files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return [line for line in [*maps.splitlines(), *files] if line.endswith(".npy")]

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs a list of what is mapped")
    renamed, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (renamed.append((str(b), held())), replace(a, b))
    )
    for _ in range(2):  # made anew, and in the place of damaged ones
        make(tmp_path, Source())
        flip_a_bit(tmp_path)
    assert [Path(name).name for name, _ in renamed] == ["a.npz", "a.npy"] * 2
    assert [files for name, files in renamed if name.endswith(".npy")] == [[], []]


def test_without_a_stream_for_errors(tmp_path, monkeypatch):
    # As programs without a console have it on Windows.
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    arrays = make(tmp_path, Source())
    assert np.array_equal(arrays["vertices"], Source().vertices.astype(np.float32))


def test_progress_is_shown_after_two_seconds(tmp_path, capsys):
    make(tmp_path / "short", Source())
    assert capsys.readouterr().err == ""
    make(tmp_path / "long", Source(pause=0.5))
    assert "Making: 100%" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"Expected to write to .*file"):
        make(tmp_path / "file", Source())


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"Expected to write to .*got: .*(not implemented|flock)"):
        make(tmp_path, Source())


def test_those_who_waited_for_one_that_failed_take_turns(tmp_path):
    # Two fail, and the third of those who wait makes the meshes: never two at once.
    busy, most, errors, results = [0], [0], [], []

    class Watched(Source):
        def blocks(self, start):
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            try:
                yield from super().blocks(start)
            finally:
                busy[0] -= 1

    def work(source):
        try:
            results.append(make(tmp_path, source))
        except ValueError as e:
            errors.append(e)

    sources = [Watched(fail_at=3, pause=0.02) for _ in range(2)]
    failing = [threading.Thread(target=work, args=(s,)) for s in sources]
    others = [threading.Thread(target=work, args=(Watched(pause=0.02),)) for _ in range(4)]
    for thread in failing:
        thread.start()
    time.sleep(0.05)
    for thread in others:
        thread.start()
    for thread in [*failing, *others]:
        thread.join(timeout=60)
    assert most == [1] and len(results) + len(errors) == 6 and len(results) >= 4
    for arrays in results:
        assert np.array_equal(arrays["vertices"], Source().vertices.astype(np.float32))
    assert names(tmp_path) == ["a.npy", "a.npz"]


def test_names_with_brackets(tmp_path):
    # Which are a pattern to a search for files.
    path = tmp_path / "a[1].npz"
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            source = Source(fail_at=3, error=KeyboardInterrupt)
            stored(path, {"seed": seed}, lambda s=source: s, "Making")
    stored(path, {"seed": 3}, Source, "Making")
    assert names(tmp_path) == ["a[1].npy", "a[1].npz"]


def test_in_memory_where_asked_for(tmp_path):
    arrays = make(tmp_path, Source(), mapped=False)
    assert names(tmp_path) == ["a.npz"]
    assert not is_mapped(arrays["vertices"])
    assert np.array_equal(arrays["vertices"], Source().vertices.astype(np.float32))


@pytest.mark.parametrize("cut", [0, 50, 128, 129, 128 + 3 * 84, 128 + 7 * 84 + 5, 10**6])
def test_goes_on_where_it_was_cut_off(tmp_path, cut):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make(whole, Source())
    with pytest.raises(KeyboardInterrupt):
        make(killed, Source(fail_at=4, error=KeyboardInterrupt))
    (partial,) = killed.glob("*.npy")
    assert partial.name.startswith(".a.") and partial.name.endswith(".partial.npy")
    size = min(cut, partial.stat().st_size)
    os.truncate(partial, size)

    source = Source()
    make(killed, source)
    ends = 128 + 84 * np.cumsum([0, *SIZES])
    assert source.started == [max(int((ends <= size).sum()) - 1, 0)]
    assert content(killed) == content(whole)


@pytest.mark.parametrize("place", [3, 128 + 5, 128 + 84 * 4, 128 + 84 * 10, "sums", "no sums"])
def test_goes_on_before_what_was_damaged(tmp_path, place):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make(whole, Source())
    with pytest.raises(KeyboardInterrupt):
        make(killed, Source(fail_at=4, error=KeyboardInterrupt))
    (partial,), (sums,) = killed.glob("*.npy"), killed.glob("*.sums")
    if place == "no sums":
        sums.unlink()
    else:
        file, place = (sums, 2 * 65 + 7) if place == "sums" else (partial, place)
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
    source = Source()
    make(killed, source)
    first = {3: 0, 128 + 5: 0, 128 + 84 * 4: 1, 128 + 84 * 10: 3, 2 * 65 + 7: 2, "no sums": 0}
    assert source.started == [first[place]]
    assert content(killed) == content(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_twice_by_the_system(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make(whole, Source())
    for blocks in (1, 3):
        run = multiprocessing.get_context("fork").Process(
            target=make, args=(killed, Source(pause=0.2))
        )
        run.start()
        size = 128 + 84 * sum(SIZES[:blocks])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if killed.exists() and any(p.stat().st_size >= size for p in killed.iterdir()):
                break
            time.sleep(0.005)
        run.kill()
        run.join()
        (partial,) = killed.glob("*.partial.npy")
        assert size <= partial.stat().st_size < 128 + 84 * sum(SIZES)
    source = Source()
    make(killed, source)
    assert source.started[0] >= 3
    assert content(killed) == content(whole)  # no lock is left either


def test_one_process_makes_and_the_others_wait(tmp_path):
    sources, results = [Source(pause=0.01) for _ in range(8)], []
    threads = [
        threading.Thread(target=lambda s=s: results.append(make(tmp_path, s))) for s in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(len(source.started) for source in sources) == 1
    assert len(results) == 8
    for arrays in results:
        assert np.array_equal(arrays["vertices"], sources[0].vertices.astype(np.float32))
    assert names(tmp_path) == ["a.npy", "a.npz"]


@pytest.mark.parametrize("fail_at", [0, 2])
def test_nothing_is_left_of_a_source_that_fails(tmp_path, fail_at):
    with pytest.raises(ValueError, match="no more"):
        make(tmp_path, Source(fail_at=fail_at))
    assert names(tmp_path) == []


def test_a_source_of_fewer_meshes_than_it_says(tmp_path):
    source = Source()
    source.sizes = [*SIZES, 2]
    with pytest.raises(ValueError, match=r"Expected 1388 bytes .*got 1220"):
        make(tmp_path, source)
    assert names(tmp_path) == []


def test_no_space_is_noticed_before_and_while_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 500, 500))
        with pytest.raises(ValueError, match=r"Expected 0 MB of free space for .*got 0 MB"):
            make(tmp_path, Source())
    assert names(tmp_path) == []

    # The system refuses to let a file grow, as a full disk does.
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        with pytest.raises(ValueError, match=r"Expected to write to .*got: .*too large"):
            make(tmp_path, Source())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
    make(tmp_path, Source())


def flip_a_bit(folder):
    data = bytearray((folder / "a.npy").read_bytes())
    data[500] ^= 1
    (folder / "a.npy").write_bytes(data)


def cut_vertices(folder):
    os.truncate(folder / "a.npy", 700)


def cut_the_rest(folder):
    os.truncate(folder / "a.npz", 300)


def lose_vertices(folder):
    (folder / "a.npy").unlink()


def lose_the_rest(folder):
    (folder / "a.npz").unlink()


def take_those_of_another_seed(folder):
    make(folder / "other", Source(), {"generator": 1, "seed": 6})
    for name in ("a.npy", "a.npz"):
        (folder / "other" / name).replace(folder / name)
    (folder / "other").rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut_vertices,
        cut_the_rest,
        lose_vertices,
        lose_the_rest,
        take_those_of_another_seed,
    ],
)
def test_made_again_if_damaged(tmp_path, damage):
    make(tmp_path, Source())
    before = content(tmp_path)
    damage(tmp_path)
    source = Source()
    arrays = make(tmp_path, source)
    assert source.started == [0]
    assert np.array_equal(arrays["vertices"], source.vertices.astype(np.float32))
    assert content(tmp_path) == before


def test_what_other_settings_have_left_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Source(fail_at=3, error=KeyboardInterrupt), {"generator": 0, "seed": 5})
    source = Source()
    make(tmp_path, source)
    assert source.started == [0]  # nothing of the other generator is gone on with
    assert names(tmp_path) == ["a.npy", "a.npz"]
