r"""What was once seen to fail, case by case, in words of the package's users: crashes, hangs, wrong
numbers without an error, and errors that name nothing."""

import io
import math
import os
import shutil
import struct
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    Mapping,
    MappingPool,
    MeshHierarchy,
    MorphableModel,
    SpiralConv,
    StaticChebConv,
    freeze,
)
from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.mesh import check_mesh, read_mesh, read_scan, spiral_sequences, write_mesh
from pyg_attnpool.mesh.closest import closest_points
from pyg_attnpool.nn.learned_pools import WeightedPool
from tests.mesh.meshes import blob, icosphere, join

FAR = np.array([500_000, 5_400_000, 100.0])  # as the coordinates of maps
MEMORY = 1 << 30  # for threads and a training

RING = torch.arange(6)
EDGES = torch.stack([torch.cat([RING, RING.roll(1)]), torch.cat([RING.roll(1), RING])])


def mapping(weight=1.0):
    return Mapping(torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]]), torch.full((4, 2), weight), 3)


def refused(function, word="", kinds=(ValueError, TypeError)):
    try:
        out = function()
    except kinds as e:
        assert word in str(e), f"{word!r} is not in {e}"
        return
    raise AssertionError(f"taken: {out}")


# State ###############################################################################


def loaded_index_out_of_range(folder):
    pool = AttentionPool(3, 4, k=2, prior=mapping())
    state = {**pool.state_dict(), "prior_index": torch.full((4, 2), -1)}
    refused(lambda: pool.load_state_dict(state), "prior_index")
    pool(torch.ones(1, 3, 8, requires_grad=True)).sum().backward()


def cast_by_type(folder):
    pool = MappingPool(torch.eye(4)[:2]).type(torch.float32)
    x = torch.randn(4, 3)
    assert_close(pool(x), x[:2])


def assigned_on_the_meta_device(folder):
    with torch.device("meta"):
        pool = AttentionPool(64, 16)
    source = AttentionPool(64, 16)
    pool.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(64, 3)
    assert_close(pool(x), source(x))


def gradient_of_a_loaded_weighted_pool(folder):
    other = Mapping(torch.tensor([[2, 1], [0, 2], [2, 0], [1, 1]]), torch.rand(4, 2), 3)
    pool, source = WeightedPool(mapping()), WeightedPool(other)
    pool.load_state_dict(source.state_dict())
    grads = []
    for each in (pool, source):
        x = torch.ones(3, 2, requires_grad=True)
        each(x).square().sum().backward()
        grads.append(x.grad)
    assert_close(*grads)


def index_edited_in_place(folder):
    pool = MappingPool(mapping())
    pool.index[0, 0] = 2**40
    x = torch.randn(3, 3, requires_grad=True)
    refused(lambda: pool(x).sum().backward())


def edits_that_count_no_version(folder):
    for edit in (lambda index: index.data, lambda index: index.numpy()):
        pool, x = MappingPool(mapping()), torch.randn(3, 3, requires_grad=True)
        pool(x).sum().backward()
        edit(pool.index)[0, 0] = 2
        x.grad = None
        pool(x).sum().backward()
        assert_close(x.grad, pool.mapping().to_dense().sum(0).view(3, 1).expand(3, 3))
        edit(pool.index)[0, 0] = 2**40
        refused(lambda pool=pool, x=x: pool(x))
        conv = SpiralConv(3, 4, torch.tensor([[0, 1], [1, 2], [2, 0]]))
        conv(x)
        edit(conv.spirals)[0, 1] = 2
        spirals = torch.tensor([[0, 2], [1, 2], [2, 0]])
        assert_close(conv(x), conv.lin(x[spirals].flatten(1)))
        model = small_model().freeze()
        z = torch.randn(2, 2)
        with torch.no_grad():
            model.decode(z)
        edit(model.autoencoder.unpools[0].index)[0] = 1
        with torch.no_grad():
            found = model.decode(z)
        assert_close(found, model.decode(z).detach(), rtol=1e-4, atol=1e-4)


def index_shared_with_the_caller(folder):
    index = torch.zeros(4, 2).long()
    pool = MappingPool(Mapping(index, torch.ones(4, 2), 3))
    index.fill_(2**40)
    assert_close(pool(torch.ones(3, 1)), torch.full((4, 1), 2.0))


def narrower_weight(folder):
    pool = MappingPool(mapping())
    pool.weight.data = pool.weight.data[:, :1]
    refused(lambda: pool(torch.randn(3, 3)), kinds=(ValueError, RuntimeError))


def mapping_edited_in_place(folder):
    for bad in (-1, 3, 2**40):
        edited = mapping()
        edited.index[0, 0] = bad
        for use in (Mapping.to_dense, Mapping.to_edge_index, Mapping.to_scipy):
            refused(lambda use=use, edited=edited: use(edited))
        refused(lambda edited=edited: edited @ torch.randn(3, 2))


def nan_in_a_key(folder):
    pool = AttentionPool(30, 7, 4, 2, init="normal")
    pool.key.data[3, 1] = math.nan
    assert pool(torch.randn(30, 2)).isnan().any()
    refused(lambda: freeze(torch.nn.Sequential(pool)), "key")


def data_of_a_frozen_model(folder):
    model = small_model().freeze()
    z = torch.randn(2, 2)
    with torch.no_grad():
        model.decode(z)
        model.mean.data += 1
        model.autoencoder.unpools[0].weight.numpy()[:] *= 2
        found = model.decode(z)
    with torch.enable_grad():
        assert_close(found, model.decode(z).detach(), rtol=1e-4, atol=1e-4)


# Tools of torch ######################################################################


def layers():
    return {
        "MappingPool": (MappingPool(mapping()), 3),
        "AttentionPool": (AttentionPool(6, 4, 5, 3, init="normal"), 6),
        "AttentionUnpool": (AttentionUnpool(6, 9, 5, 4, init="normal"), 6),
        "StaticChebConv": (StaticChebConv(3, 4, 3, EDGES, 6), 6),
        "SpiralConv": (SpiralConv(3, 4, torch.randint(6, (6, 4))), 6),
    }


def traced(folder):
    for layer, n in layers().values():
        x = torch.randn(2, n, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer
            assert_close(torch.jit.trace(layer, x)(2 * x), layer(2 * x))


def forward_mode(folder):
    for layer, n in layers().values():
        x, t = torch.randn(2, n, 3), torch.ones(2, n, 3)
        _, moved = torch.func.jvp(layer, (x,), (t,))
        assert_close(moved, layer(x + t) - layer(x), rtol=1e-3, atol=1e-4)  # it is linear


def batched(folder):
    for layer, n in layers().values():
        x = torch.randn(5, 2, n, 3)
        assert_close(torch.vmap(layer)(x), torch.stack([layer(each) for each in x]))


def gradients_by_transforms(folder):
    for layer, n in layers().values():
        x = torch.randn(n, 3)
        found = torch.func.grad(lambda x, layer=layer: layer(x).square().sum())(x)
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert_close(found, x.grad, rtol=1e-4, atol=1e-4)


def batches_of_gradients(folder):
    for layer, n in layers().values():
        x = torch.randn(n, 3, requires_grad=True)
        y = layer(x)
        heads = torch.randn(3, *y.shape)
        (found,) = torch.autograd.grad(y, x, heads, is_grads_batched=True, retain_graph=True)
        wanted = [torch.autograd.grad(y, x, head, retain_graph=True)[0] for head in heads]
        assert_close(found, torch.stack(wanted))


def spectral_norm_of_a_convolution(folder):
    for layer, inner in (
        (layers()["StaticChebConv"][0], "lins.0"),
        (layers()["SpiralConv"][0], "lin"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.spectral_norm(layer.get_submodule(inner), "weight")
        layer(torch.randn(6, 3)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters()), "one has no gradient"


# Reading #############################################################################

PLY = (
    b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
    b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
)
OFF = b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


def bad_file(suffix, content):
    def claim(folder):
        path = folder / f"bad.{suffix}"
        path.write_bytes(content)
        refused(lambda: read_mesh(path), "bad", (ValueError,))

    return claim


def textured_ply(folder):
    header = PLY.split(b"0 0 0")[0].replace(b"ascii", b"binary_little_endian")
    header = header.replace(
        b"end_header", b"property list uchar float texcoord\nproperty uchar red\nend_header"
    ).replace(b"face 1", b"face 2")
    body = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0)
    body += struct.pack("<B3iB6fB", 3, 0, 1, 2, 6, *range(6), 9)
    body += struct.pack("<B3iBB", 3, 2, 1, 0, 0, 9)
    (folder / "t.ply").write_bytes(header + body)
    assert read_mesh(folder / "t.ply")[1].tolist() == [[0, 1, 2], [2, 1, 0]]


def header_of_many_properties(folder):
    # In time proportional to its size: some 0.2 s, and minutes where every name is compared.
    names = b"".join(b"property int p%d\n" % i for i in range(60_000))
    (folder / "bad.ply").write_bytes(
        PLY.replace(b"element face", b"element q 0\n" + names + b"element face")
    )
    read_mesh(folder / "bad.ply")


def header_that_asks_for_more_than_is_there(folder):
    entry = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        entry, {"shape": (10**12, 3), "fortran_order": False, "descr": "<f8"}
    )
    with zipfile.ZipFile(folder / "bad.npz", "w") as file:
        file.writestr("vertices.npy", entry.getvalue() + bytes(24))
    refused(lambda: RegisteredMeshes(folder / "bad.npz"), "bad.npz", (ValueError,))
    refused(lambda: MeshHierarchy.load(folder / "bad.npz"), "bad.npz", (ValueError,))
    (folder / "bad.npy").write_bytes(entry.getvalue() + bytes(24))
    refused(lambda: read_scan(folder / "bad.npy"), "bad.npy", (ValueError,))


def deep_description_of_a_model(folder):
    shutil.copytree(folder.parent / "first" / "model", folder / "model")
    (folder / "model" / "config.json").write_text("[" * 200_000)
    refused(lambda: MorphableModel.load(folder / "model"), "config.json", (ValueError,))


def degenerate_face_is_named(folder):
    (folder / "d.off").write_bytes(OFF.replace(b"3 1 0", b"3 2 0") + b"3 1 1 2\n")

    def read():
        return check_mesh(*read_mesh(folder / "d.off"))

    refused(read, "face 1")


def doubles_stay_doubles(folder):
    vertices, faces = icosphere(1)
    vertices = vertices + FAR
    lines = ["OFF", f"{len(vertices)} {len(faces)} 0"]
    lines += [f"{x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    lines += [f"3 {a} {b} {c}" for a, b, c in faces.tolist()]
    (folder / "utm.off").write_text("\n".join(lines) + "\n")
    assert np.abs(read_mesh(folder / "utm.off")[0] - vertices).max() < 1e-8


def coordinates_of_maps_in_a_model(folder):
    vertices, faces = icosphere(1)
    refused(
        lambda: MorphableModel.pca((vertices + FAR, faces)),
        "near the origin",
    )


def coincident_vertices(folder):
    (folder / "c.obj").write_text(
        "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 0\nv 0 0 1\nv 0 1 1\nf 1 2 3\nf 4 5 6\nf 1 3 5\n"
    )
    assert read_mesh(folder / "c.obj")[1].tolist() == [[0, 1, 2], [3, 4, 5], [0, 2, 4]]


def threads_keep_the_stream_of_errors(folder):
    write_mesh(folder / "m.ply", *icosphere(2))
    before = os.fstat(2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_mesh, [folder / "m.ply"] * 200))
    assert os.fstat(2).st_ino == before.st_ino, "it is another one"


def natural_order_without_temporaries(folder):
    place = folder / "scans"
    place.mkdir()
    for name, shift in (("m2", 2), ("m10", 10), ("m1", 1), (".m0", 9)):
        vertices, faces = icosphere(0)
        lines = [f"v {x} {y} {z}" for x, y, z in (vertices + shift).tolist()]
        lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
        (place / f"{name}.obj").write_text("\n".join(lines) + "\n")
    centres = RegisteredMeshes(place).vertices.mean(dim=(1, 2)).round().tolist()
    assert centres == [1, 2, 10], centres


def repair_takes_registered_meshes_along(folder):
    from pyg_attnpool.mesh import repair

    vertices, faces = icosphere(1)
    vertices = np.concatenate([vertices, [[9.0, 9, 9]]])
    mesh = repair(vertices, np.concatenate([faces, faces[:1], [[1, 1, 2]]]))
    check_mesh(mesh.vertices, mesh.faces)
    assert mesh.apply(np.stack([vertices, 2 * vertices])).shape == (2, 42, 3)


# Geometry ############################################################################


def spirals_end(folder):
    for size, kwargs in ((0, {"hops": 4}), (2, {"hops": 10}), (2, {"length": 162})):
        found = spiral_sequences(*icosphere(size), **kwargs)
        assert (found[:, 0] == np.arange(len(found))).all()
    assert (spiral_sequences(*blob(1, seed=0, hole=True), hops=6)[:, 0] >= 0).all()


def sixteen_components(folder):
    parts = [(0.5 * v + [3 * i, 0, 0], f) for i, (v, f) in enumerate([icosphere(1)] * 16)]
    vertices, faces = join(*parts)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hierarchy = MeshHierarchy.from_template((vertices, faces))
    x = torch.from_numpy(vertices)
    for down in hierarchy.down:
        x = down @ x
    for up in reversed(hierarchy.up):
        x = up @ x
    away = (x - torch.from_numpy(vertices)).norm(dim=1).max().item()
    assert away < 1 or told, f"vertices come back {away:.1f} away without a word"


def fan_of_many_faces(folder):
    n = 20_000
    angle = 2 * np.pi * np.arange(n) / n
    vertices = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    vertices = np.concatenate([[[0, 0, 0.3]], vertices])
    faces = np.stack([0 * np.arange(n), 1 + np.arange(n), 1 + (np.arange(n) + 1) % n], axis=1)
    points = np.random.default_rng(0).normal(size=(200, 3))
    _, _, distance = closest_points(points, vertices, faces)
    assert np.isfinite(distance).all()


# Writing, running, resuming ##########################################################


def full_disk(folder):
    import resource

    vertices, faces = icosphere(3)
    path = folder / "good.ply"
    write_mesh(path, vertices, faces)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        refused(lambda: write_mesh(path, vertices, faces), kinds=(OSError, ValueError))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before, "the good file is gone"


def small_model(**kwargs):
    torch.manual_seed(0)
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[3])
    return MorphableModel.coma(hierarchy, 2, channels=(4,), **kwargs)


FIT = dict(epochs=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)


def small_meshes(seed=0):
    noise = torch.randn(30, 42, 3, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(icosphere(1)[0]).float() + 0.05 * noise


def bad_argument_keeps_checkpoints(folder):
    small_model().fit(small_meshes(), output=folder / "run", **FIT)
    before = {p.name: p.read_bytes() for p in (folder / "run").glob("*.ckpt")}
    for bad in ({"precision": "none"}, {"loss": 3}, {"lr": "fast"}, {"callbacks": [3]}):
        refused(
            lambda bad=bad: small_model().fit(
                small_meshes(), output=folder / "run", **{**FIT, **bad}
            ),
            kinds=(Exception,),
        )
        after = {p.name: p.read_bytes() for p in (folder / "run").glob("*.ckpt")}
        assert after == before, f"{bad} has deleted them"


def resumed_with_another_activation(folder):
    small_model().fit(small_meshes(), output=folder / "act", **FIT)
    more = {**FIT, "epochs": 2, "output": folder / "act", "resume": True}
    refused(lambda: small_model(activation="elu").fit(small_meshes(), **more), "activation")


def resumed_on_other_meshes(folder):
    small_model().fit(small_meshes(), output=folder / "data", **FIT)
    more = {**FIT, "output": folder / "data", "resume": True}
    refused(lambda: small_model().fit(small_meshes(seed=1), **more))


def flipped_bits_of_a_checkpoint(folder):
    small_model().fit(small_meshes(), output=folder / "bits", **FIT)
    path = folder / "bits" / "last.ckpt"
    whole = path.read_bytes()
    more = {**FIT, "output": folder / "bits", "resume": True}
    for place in range(500, len(whole), len(whole) // 12):
        content = bytearray(whole)
        content[place] ^= 16
        path.write_bytes(content)
        refused(lambda: small_model().fit(small_meshes(), **more), "last.ckpt")


def folders_of_one_name(folder):
    for place, shift in (("a", 0), ("b", 1)):
        (folder / place / "scans").mkdir(parents=True)
        vertices, faces = icosphere(0)
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in (vertices + shift).tolist()]
        lines += [f"f {i} {j} {k}" for i, j, k in (faces + 1).tolist()]
        path = folder / place / "scans" / "0.obj"
        path.write_text("\n".join(lines).ljust(2000) + "\n")
        os.utime(path, (10**9, 10**9))
    centres = [
        RegisteredMeshes(folder / place / "scans", cache=folder / "c").vertices.mean().item()
        for place in "ab"
    ]
    assert abs(centres[1] - centres[0] - 1) < 1e-3, "the second has the first's vertices"


def a_model_replaces_a_model_alone(folder):
    place = folder / "documents"
    place.mkdir()
    (place / "thesis.tex").write_text("years")
    refused(lambda: small_model().save(place), "thesis.tex")
    assert (place / "thesis.tex").read_text() == "years"


def no_streams(folder):
    import sys

    streams = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = None
    try:
        small_model().fit(small_meshes(), epochs=1, accelerator="cpu")
    finally:
        sys.stdout, sys.stderr = streams


# The list ############################################################################


def one_file_written_by_threads(folder):
    # A hundred writes of one file from eight threads: each is whole.
    with ThreadPoolExecutor(8) as pool:
        meshes = [icosphere(i % 3) for i in range(100)]
        list(pool.map(lambda mesh: write_mesh(folder / "one.ply", *mesh), meshes))
    assert len(read_mesh(folder / "one.ply")[0]) in (12, 42, 162)


CLAIMS = {
    function.__name__.replace("_", " "): function
    for function in (
        loaded_index_out_of_range,
        cast_by_type,
        assigned_on_the_meta_device,
        gradient_of_a_loaded_weighted_pool,
        index_edited_in_place,
        edits_that_count_no_version,
        index_shared_with_the_caller,
        narrower_weight,
        mapping_edited_in_place,
        nan_in_a_key,
        data_of_a_frozen_model,
        traced,
        forward_mode,
        batched,
        gradients_by_transforms,
        batches_of_gradients,
        spectral_norm_of_a_convolution,
        textured_ply,
        header_of_many_properties,
        header_that_asks_for_more_than_is_there,
        deep_description_of_a_model,
        degenerate_face_is_named,
        doubles_stay_doubles,
        coordinates_of_maps_in_a_model,
        coincident_vertices,
        threads_keep_the_stream_of_errors,
        natural_order_without_temporaries,
        repair_takes_registered_meshes_along,
        spirals_end,
        sixteen_components,
        fan_of_many_faces,
        full_disk,
        bad_argument_keeps_checkpoints,
        resumed_with_another_activation,
        resumed_on_other_meshes,
        flipped_bits_of_a_checkpoint,
        folders_of_one_name,
        a_model_replaces_a_model_alone,
        no_streams,
        one_file_written_by_threads,
    )
}
for token in (b"nan", b"inf", b"1e999", b"x"):
    CLAIMS[f"PLY with {token.decode()}"] = bad_file(
        "ply", PLY.replace(b"1 0 0", token + b" 0 0", 1)
    )
for count in (b"1000000000", b"-1", b"4294967296"):
    content = PLY.replace(b"vertex 3", b"vertex " + count)
    CLAIMS[f"PLY of {count.decode()} vertices"] = bad_file("ply", content)
    CLAIMS[f"OFF of {count.decode()} vertices"] = bad_file(
        "off", OFF.replace(b"3 1", count + b" 1")
    )
CLAIMS["binary OFF of 1000000000 vertices"] = bad_file(
    "off", b"OFF BINARY\n" + struct.pack("<3I", 10**9, 1, 0) + bytes(90)
)
CLAIMS["PLY without a version"] = bad_file("ply", PLY.replace(b" 1.0", b""))
BINARY = PLY.split(b"0 0 0")[0].replace(b"ascii", b"binary_little_endian")
BINARY += struct.pack("<9fB3i", *range(9), 3, 0, 1, 2)
for cut in (3, 4, 5):
    CLAIMS[f"PLY cut by {cut} bytes"] = bad_file("ply", BINARY[:-cut])
CLAIMS["STL with nan"] = bad_file(
    "stl",
    b"solid\nfacet normal 0 0 1\nouter loop\nvertex nan 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\n"
    b"endfacet\nendsolid\n",
)
NAMES = list(CLAIMS)


def prepare(folder: Path) -> None:
    r"""Imports what the claims need, and what they need to write and train."""
    place = folder / "first"
    small_model().fit(small_meshes(), output=place, **FIT).save(place / "model")


def name(number: int) -> str:
    return NAMES[number]


def case(number: int, folder: Path) -> None:
    torch.manual_seed(0)
    place = folder / str(number)
    place.mkdir()
    CLAIMS[NAMES[number]](place)
