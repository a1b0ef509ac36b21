import subprocess
import sys

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import FaceToEdge

from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.datasets.inputs import blocks, check_meshes

TEMPLATE = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]])


def make(num, **labels):
    # Mesh i holds i everywhere.
    vertices = torch.arange(num).float().view(-1, 1, 1).repeat(1, 3, 3)
    return MeshDataset(vertices, TEMPLATE, labels)


def sequences(num_subjects, expressions, frames):
    rows = [
        (f"s{s}", e, i) for s in range(num_subjects) for e in expressions for i in range(frames)
    ]
    subject, expression, frame = map(list, zip(*rows, strict=True))
    return make(len(rows), subject=subject, expression=expression, frame=frame)


@pytest.mark.parametrize("num", [100, 105, 2880, 20465])
def test_interpolation_is_the_published_rule(num):
    train, val, test = [], [], []
    for i in range(num):
        (test if i % 100 < 11 else val if i % 100 < 21 else train).append(i)
    split = make(num).split("interpolation")
    assert split.train.tolist() == train
    assert split.val.tolist() == val
    assert split.test.tolist() == test


@pytest.mark.parametrize(
    ("num", "num_test", "num_val"), [(3, 1, 1), (10, 2, 1), (30, 4, 3), (99, 11, 10)]
)
def test_interpolation_of_few_meshes_is_one_block_in_proportion(num, num_test, num_val):
    split = make(num).split("interpolation")
    assert split.test.tolist() == list(range(num_test))
    assert split.val.tolist() == list(range(num_test, num_test + num_val))
    assert split.train.tolist() == list(range(num_test + num_val, num))


@pytest.mark.parametrize("kind", ["extrapolation", "identity"])
def test_held_out_meshes_are_the_test_part(kind):
    dataset = sequences(4, ["angry", "bored", "calm"], 25)
    key, value = ("expression", "bored") if kind == "extrapolation" else ("subject", "s2")
    split = dataset.split(kind, **{key: value})

    labels = getattr(dataset, key)
    test = [i for i in range(300) if labels[i] == value]
    rest = [i for i in range(300) if labels[i] != value]
    assert split.test.tolist() == test
    assert split.val.tolist() == [i for n, i in enumerate(rest) if n % 100 < 10]
    assert sorted(torch.cat(split).tolist()) == list(range(300))
    for part in split:
        assert part.dtype == torch.long
        assert part.tolist() == sorted(part.tolist())


def test_held_out_few_meshes():
    split = sequences(2, ["angry", "bored"], 3).split("identity", subject="s0")
    assert [part.tolist() for part in split] == [[7, 8, 9, 10, 11], [6], [0, 1, 2, 3, 4, 5]]


def test_whole_sequences_are_the_test_part():
    expressions = ["angry", "bored", "calm"]
    dataset = sequences(7, expressions, 5)  # 21 sequences
    split = dataset.split("sequence")
    place = [i // 5 for i in range(105)]
    assert sorted({place[i] for i in split.test}) == [0, 10, 20]
    assert sorted({place[i] for i in split.val}) == [1, 11]
    assert len(split.test) == 15 and len(split.val) == 10
    assert sorted(torch.cat(split).tolist()) == list(range(105))
    # Which ones does not depend on the order of the meshes.
    mixed = dataset[torch.randperm(105)]
    held_out = {(mixed.subject[i], mixed.expression[i]) for i in mixed.split("sequence").test}
    assert held_out == {("s0", "angry"), ("s3", "bored"), ("s6", "calm")}


@pytest.mark.parametrize("num", [100, 1000, 1234])
def test_a_tenth_of_independent_meshes_is_the_test_part(num):
    split = make(num).split("independent")
    assert split.test.tolist() == [i for i in range(num) if i % 100 < 10]
    rest = [i for i in range(num) if i % 100 >= 10]
    # 90 meshes are less than a block, of which a tenth is 9.
    assert split.val.tolist() == [
        i for n, i in enumerate(rest) if n % 100 < (9 if num == 100 else 10)
    ]
    assert sorted(torch.cat(split).tolist()) == list(range(num))


def test_listed_meshes_are_the_test_part():
    dataset = make(20, name=[f"m{i}" for i in range(20)])
    split = dataset.split("listed", names=["m7", "m3"])
    assert split.test.tolist() == [3, 7]
    assert split.val.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"such as 'm0' .got 'm20' and 1 other"):
        dataset.split("listed", names=["m3", "m20", "m21"])
    with pytest.raises(ValueError, match=r"known 'name', and 'names'"):
        make(20).split("listed", names=["m3"])
    with pytest.raises(ValueError, match=r"no 'names' for kind='independent' .got 1"):
        dataset.split("independent", names=["m3"])


def test_read_takes_meshes_of_a_subset():
    subset = sequences(3, ["calm", "angry"], 2)[torch.tensor([9, 0, 4])]
    read = subset.read(torch.tensor([2, 0]))
    assert read[:, 0, 0].tolist() == [4, 9]
    read[:] = 0
    assert subset.vertices[:, 0, 0].tolist() == [9, 0, 4]


def test_split_names_what_is_known():
    dataset = sequences(2, ["calm", "angry"], 5)
    with pytest.raises(ValueError, match=r"one of \['angry', 'calm'\] \(got 'happy'\)"):
        dataset.split("extrapolation", expression="happy")
    with pytest.raises(ValueError, match=r"one of \['s0', 's1'\] \(got None\)"):
        dataset.split("identity")
    with pytest.raises(ValueError, match=r"no 'subject' for kind='extrapolation' \(got 's0'\)"):
        dataset.split("extrapolation", expression="calm", subject="s0")
    with pytest.raises(ValueError, match=r"'kind'.*got 'random'"):
        dataset.split("random")
    with pytest.raises(ValueError, match="known 'subject'"):
        make(10).split("identity", subject="s0")


def test_split_without_a_part_is_refused():
    with pytest.raises(ValueError, match="got 2, that is 0 for training"):
        make(2).split("interpolation")
    with pytest.raises(ValueError, match="got 5, that is 0 for training, 0 for validation and 5"):
        sequences(1, ["calm"], 5).split("identity", subject="s0")


def test_meshes_are_views_of_one_tensor():
    dataset = sequences(2, ["calm"], 4)
    data = dataset[5]
    assert data.pos.untyped_storage().data_ptr() == dataset.vertices.untyped_storage().data_ptr()
    dataset.vertices[5, 0] = 77
    assert data.pos[0].tolist() == [77, 77, 77]
    assert data.face.tolist() == [[0], [1], [2]]
    assert dataset[6].face.data_ptr() == data.face.data_ptr()
    assert (data.subject, data.expression, data.frame) == ("s1", "calm", 1)
    assert "name" not in data and dataset.name is None


def test_a_subset_keeps_vertices_and_labels_together():
    dataset = sequences(3, ["calm", "angry"], 2)
    subset = dataset[torch.tensor([9, 0, 4])]
    assert len(subset) == len(subset.vertices) == 3
    assert subset.vertices[:, 0, 0].tolist() == [9, 0, 4]
    assert [data.pos[0, 0].item() for data in subset] == [9, 0, 4]
    assert subset.subject == ["s2", "s0", "s1"]
    assert subset.frame == [1, 0, 0]
    assert subset[1:].subject == ["s0", "s1"]
    assert subset.split("interpolation").test.tolist() == [0]
    assert len(dataset) == 12


def test_mini_batches_and_transform():
    dataset = sequences(2, ["calm"], 3)
    dataset.transform = FaceToEdge(remove_faces=False)
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch.edge_index.size(1) == 4 * 6
    assert batch.pos.view(4, 3, 3)[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch.face.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert batch.frame.tolist() == [0, 1, 2, 0]
    assert batch.subject == ["s0", "s0", "s0", "s1"]


class Recorded:
    r"""A transform that notes what it is given, and writes to it."""

    def __init__(self):
        self.seen = []

    def __call__(self, data):
        self.seen.append((data.subject, data.expression, data.frame))
        data.pos += 100
        data.face[:] = data.face.flip(0)
        return data


def test_a_transform_is_applied_once_to_a_copy_with_labels():
    dataset, transform = sequences(3, ["calm", "angry"], 2), Recorded()
    dataset.transform = transform
    for access in (
        lambda: dataset[7].pos[None],
        lambda: dataset[4:][3].pos[None],
        lambda: dataset.read(torch.tensor([7])),
        lambda: dataset[torch.tensor([1, 7])].read(torch.tensor([1])),
        lambda: next(iter(DataLoader(dataset[[7]], batch_size=1))).pos[None],
        lambda: next(iter(blocks(dataset[[7]], 5))),
    ):
        for _ in range(2):  # the second time as the first
            transform.seen.clear()
            assert torch.equal(access(), torch.full((1, 3, 3), 107.0))
            assert transform.seen == [("s1", "angry", 1)]
    assert torch.equal(dataset.vertices[7], torch.full((3, 3), 7.0))
    assert dataset.face.tolist() == [[0], [1], [2]]


def test_a_transform_may_add_features():
    dataset = sequences(2, ["calm"], 3)

    def add(data):
        data.x = torch.full((3, 2), float(data.frame))
        return data

    dataset.transform = add
    assert dataset.vertices_shape == [6, 3, 5]
    assert dataset.read(torch.tensor([2, 4]))[:, 0].tolist() == [[2, 2, 2, 2, 2], [4, 4, 4, 1, 1]]
    # The number of features is that of the model, and no mesh has another.
    check_meshes("meshes", dataset, 3, 5)
    dataset.transform = lambda data: add(data) if data.frame else data
    with pytest.raises(ValueError, match=r"features 'x' of shape None .*got \[3, 2\] in mesh 1"):
        dataset.read(torch.tensor([0, 1]))


def test_transforms_that_are_none():
    dataset = sequences(1, ["calm"], 3)
    dataset.transform = lambda data: None
    with pytest.raises(TypeError, match=r"returns Data .got NoneType"):
        dataset.read(torch.tensor([0]))
    dataset.transform = lambda data: data if data.frame else Data(pos=data.pos[:2], face=data.face)
    with pytest.raises(ValueError, match=r"'pos' of shape \[2, 3\] .*got \[3, 3\] in mesh 1"):
        dataset.read(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"callable 'transform' .got str"):
        MeshDataset(torch.zeros(4, 3, 3), TEMPLATE, transform="center")


def test_no_mesh_is_split_with_a_clear_line():
    empty = sequences(1, ["calm"], 3)[:0]
    for kind in ("interpolation", "independent", "sequence"):
        with pytest.raises(ValueError, match="enough meshes for three parts .got 0"):
            empty.split(kind)


def test_import_needs_no_extra(tmp_path):
    # None in sys.modules makes an import fail as if the package were absent.
    code = """
import sys
for name in ("openmesh", "anny", "roma", "trimesh", "warp", "matplotlib", "pytorch_lightning",
             "torchmetrics", "torch_sparse", "torch_scatter", "h5py"):
    sys.modules[name] = None
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands
for dataset in (AnnyBodies, AnnyFaces, AnnyHands):
    try:
        dataset(sys.argv[1])
    except ImportError as e:
        print(e)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    for line, name in zip(run.stdout.splitlines(), ("Bodies", "Faces", "Hands"), strict=True):
        assert line.startswith(f"Making 'Anny{name}' requires 'anny'")
        assert 'pip install "pyg_attnpool[data]"' in line
