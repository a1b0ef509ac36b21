import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch_geometric.datasets

from pyg_attnpool.datasets import DynamicFAUST
from tests.mesh.meshes import icosphere

h5py = pytest.importorskip("h5py")
TEMPLATE, FACES = icosphere(1)
SEQUENCES = {
    "m": {"50002_hips": 3, "50002_running_on_spot": 5, "50009_punching": 4},
    "f": {"50004_hips": 6, "50004_knees": 2, "50020_one_leg_loose": 1},
}


def bodies(num, seed):
    return TEMPLATE + np.random.default_rng(seed).normal(0, 0.05, (num, *TEMPLATE.shape))


def write(root, sequences=SEQUENCES, faces=FACES):
    # As the registrations are: a data set [N, 3, frames] for each sequence, and one of faces.
    (root / "raw").mkdir(parents=True, exist_ok=True)
    for sex, lengths in sequences.items():
        with h5py.File(root / "raw" / f"registrations_{sex}.hdf5", "w") as file:
            file["faces"] = faces.astype(np.uint32)
            for name, num in lengths.items():
                file[name] = bodies(num, len(name)).transpose(1, 2, 0)


def processed(root):
    folder = root / "processed"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_all_meshes_in_order(tmp_path):
    write(tmp_path)
    dataset = DynamicFAUST(tmp_path)
    lengths = dict(sorted((SEQUENCES["m"] | SEQUENCES["f"]).items()))
    expected = np.concatenate([bodies(num, len(name)) for name, num in lengths.items()])
    np.testing.assert_array_equal(dataset.vertices.numpy(), expected.astype(np.float32))
    assert dataset.name[:4] == [
        "50002_hips/00000",
        "50002_hips/00001",
        "50002_hips/00002",
        "50002_running_on_spot/00000",
    ]
    assert dataset.subject[-3:] == ["50009"] * 2 + ["50020"]
    assert dataset.expression[3:8] == ["running_on_spot"] * 5
    assert dataset.frame == [i for num in lengths.values() for i in range(num)]
    assert np.array_equal(dataset.template[1], FACES)
    np.testing.assert_allclose(dataset.template[0], expected[0], atol=1e-6)
    assert processed(tmp_path) == ["dynamic_faust.npy", "dynamic_faust.npz"]


def test_shares_its_folder_with_pygs_own(tmp_path):
    write(tmp_path)
    ours = DynamicFAUST(tmp_path)
    theirs = torch_geometric.datasets.DynamicFAUST(str(tmp_path))
    assert torch.equal(torch.cat([data.pos for data in theirs]).float(), ours.vertices), (
        "both are in order of subject and motion"
    )
    assert torch.equal(theirs[0].face, ours[0].face)


def test_read_once_without_h5py_afterwards(tmp_path):
    write(tmp_path)
    first = DynamicFAUST(tmp_path)
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from pyg_attnpool.datasets import DynamicFAUST\n"
        "print(len(DynamicFAUST(sys.argv[1])))\n"
        "try: DynamicFAUST(sys.argv[2])\n"
        "except ImportError as e: print(e)"
    )
    write(tmp_path / "new")
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tmp_path / "new"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert lines[0] == str(len(first))
    assert lines[1] == (
        "Reading Dynamic FAUST requires 'h5py': install it with `pip install \"h5py>=3.10\"`"
    )
    assert processed(tmp_path / "new") == []
    # Nor are the files themselves needed any more.
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    assert torch.equal(DynamicFAUST(tmp_path).vertices, first.vertices)


def test_read_again_when_the_content_changes(tmp_path, capsys):
    write(tmp_path)
    first = DynamicFAUST(tmp_path).vertices.clone()
    path = tmp_path / "raw" / "registrations_f.hdf5"
    size, times = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with h5py.File(path, "r+") as file:
        file["50004_knees"][7, 1, 1] = 0.5
    os.utime(path, ns=times)
    assert path.stat().st_size == size and path.stat().st_mtime_ns == times[1]
    changed = DynamicFAUST(tmp_path)
    frame = changed.name.index("50004_knees/00001")
    assert (changed.vertices != first).nonzero().tolist() == [[frame, 7, 1]]
    # Files that are as they were are not read again, whatever their times say.
    capsys.readouterr()
    os.utime(path, ns=(0, 0))
    assert torch.equal(DynamicFAUST(tmp_path).vertices, changed.vertices)
    assert capsys.readouterr().out == ""


def test_splits_hold_out_sequences_or_what_a_list_names(tmp_path):
    write(tmp_path)
    dataset = DynamicFAUST(tmp_path)
    split = dataset.split()  # six sequences: one block of ten, in proportion
    sequence = [name.split("/")[0] for name in dataset.name]
    parts = [{sequence[i] for i in part} for part in split]
    assert parts[2] == {"50002_hips"} and parts[1] == {"50002_running_on_spot"}
    assert parts[0] == set(sequence) - parts[1] - parts[2]

    (tmp_path / "test.txt").write_text("50009_punching/00002\n50004_hips/00000\n")
    listed = DynamicFAUST(tmp_path, tmp_path / "test.txt")
    test = [listed.name[i] for i in listed.split().test]
    assert test == ["50004_hips/00000", "50009_punching/00002"]
    assert sorted(torch.cat(listed.split()).tolist()) == list(range(len(listed)))
    assert listed.split("sequence").test.tolist() == split.test.tolist()

    (tmp_path / "test.txt").write_text("50009_punching/00002\n50009_dancing/00000\n")
    with pytest.raises(ValueError, match=r"such as '50002_hips/00000' .got '50009_dancing/00000'"):
        DynamicFAUST(tmp_path, tmp_path / "test.txt").split()
    with pytest.raises(FileNotFoundError, match=r"Expected the names of test meshes at .*no\.txt"):
        DynamicFAUST(tmp_path, tmp_path / "no.txt")


def edit(root, sex="f"):
    return h5py.File(root / "raw" / f"registrations_{sex}.hdf5", "a")


def nan_frame(root):
    with edit(root) as file:
        file["50004_hips"][5, 1, 4] = np.nan


def other_number_of_vertices(root):
    with edit(root) as file:
        del file["50004_hips"]
        file["50004_hips"] = np.zeros((40, 3, 6))


def other_layout(root):
    with edit(root) as file:
        del file["50004_hips"]
        file["50004_hips"] = bodies(6, 0)


def other_faces(root):
    with edit(root) as file:
        file["faces"][0] = [2, 1, 0]


def no_faces(root):
    with edit(root) as file:
        del file["faces"]


def cut_off(root):
    path = root / "raw" / "registrations_f.hdf5"
    path.write_bytes(path.read_bytes()[:-3000])


def another_file(root):
    (root / "raw" / "registrations_f.hdf5").write_bytes(b"PK\x03\x04 not HDF5 at all")


def no_sequences(root):
    write(root, {"m": {}, "f": {}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_frame, r"finite vertices in .*_f\.hdf5 \(got .* in frame 4 of 50004_hips"),
        (other_number_of_vertices, r"50004_hips of shape \[42, 3, frames\] .*got \[40, 3, 6\]"),
        (other_layout, r"50004_hips of shape \[42, 3, frames\] .*got \[6, 42, 3\]"),
        (other_faces, r"faces of .*_m\.hdf5 in .*_f\.hdf5"),
        (no_faces, r"'faces' in .*_f\.hdf5"),
        (cut_off, r"whole HDF5 file in .*_f\.hdf5"),
        (another_file, r"whole HDF5 file in .*_f\.hdf5"),
        (no_sequences, r"sequences such as '50002_hips' in .*got none"),
    ],
)
def test_bad_files_are_named_and_leave_nothing(tmp_path, spoil, message):
    write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        DynamicFAUST(tmp_path)
    assert processed(tmp_path) == []


def test_without_the_data_it_says_where_to_ask(tmp_path):
    write(tmp_path)
    (tmp_path / "raw" / "registrations_f.hdf5").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"raw/registrations_f\.hdf5 .*https://dfaust\.is\.tue\.mpg\.de"
    ):
        DynamicFAUST(tmp_path)
    assert processed(tmp_path) == []
