r"""Damaged folders: models, hierarchies, trainings and caches. What is read is what was written, or
it is refused by name, or made again. Files whose checksums were made to fit what somebody has put
into them are refused, or taken by a model that computes."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.mesh import write_mesh
from pyg_attnpool.training import quiet_lightning
from tests.hostile.damage import DAMAGES
from tests.mesh.meshes import icosphere

WHOLE = Path("whole")
KINDS = ("model", "model", "pca", "contents", "contents", "hierarchy", "training", "cache", "array")
SMALL = dict(channels=(4, 5), latent_channels=2)
FIT = dict(accelerator="cpu", enable_progress_bar=False, optimizer="sgd", batch_size=8)
MESHES, Z = torch.empty(0), torch.linspace(-1, 1, 6).view(3, 2)


def name(number: int) -> str:
    return KINDS[number % len(KINDS)]


def prepare(folder: Path) -> None:
    r"""Writes one whole folder of every kind."""
    global MESHES
    quiet_lightning()
    torch.manual_seed(0)
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[2, 2])
    vertices, faces = hierarchy.vertices[0], hierarchy.faces[0]
    MESHES = torch.from_numpy(vertices).float() + 0.05 * torch.randn(20, len(vertices), 3)
    whole = folder / WHOLE
    whole.mkdir()
    network(hierarchy).freeze().save(whole / "model")
    MorphableModel.pca((vertices, faces), 2).fit(MESHES).save(whole / "pca")
    (whole / "hierarchy").mkdir()
    hierarchy.save(whole / "hierarchy" / "h.npz")
    network(hierarchy).fit(MESHES, output=whole / "training", epochs=2, **FIT)
    shutil.rmtree(whole / "training" / "log", ignore_errors=True)
    (whole / "scans").mkdir()
    for i in range(3):
        write_mesh(whole / "scans" / f"{i}.ply", MESHES[i].numpy(), faces)
    RegisteredMeshes(whole / "scans", cache=whole / "cache")
    (whole / "array").mkdir()
    np.savez(whole / "array" / "a.npz", vertices=MESHES.numpy())
    for kind in dict.fromkeys(KINDS):
        EXPECTED[kind] = READERS[kind](folder / WHOLE, folder)


def network(hierarchy: MeshHierarchy) -> MorphableModel:
    torch.manual_seed(1)
    return MorphableModel.coma(hierarchy, pool="attention", **SMALL)


def model_of(kind):
    def read(place: Path, folder: Path):
        model = MorphableModel.load(place / kind)
        with torch.no_grad():
            return model.decode(Z), model.encode(MESHES)

    return read


def hierarchy_of(place: Path, folder: Path):
    loaded = MeshHierarchy.load(place / "hierarchy" / "h.npz")
    return (loaded.hash, *map(torch.from_numpy, loaded.vertices + loaded.faces))


def training_of(place: Path, folder: Path):
    hierarchy = MeshHierarchy.load(folder / WHOLE / "hierarchy" / "h.npz")
    model = network(hierarchy).fit(MESHES, output=place / "training", epochs=3, resume=True, **FIT)
    return tuple(model.state_dict().values())


def cache_of(place: Path, folder: Path):
    return (RegisteredMeshes(folder / WHOLE / "scans", cache=place / "cache").vertices.clone(),)


def array_of(place: Path, folder: Path):
    return (RegisteredMeshes(place / "array" / "a.npz", icosphere(1)).vertices.clone(),)


READERS = {
    "model": model_of("model"),
    "contents": model_of("model"),
    "pca": model_of("pca"),
    "hierarchy": hierarchy_of,
    "training": training_of,
    "cache": cache_of,
    "array": array_of,
}
EXPECTED: dict = {}


def equal(found, wanted) -> bool:
    return len(found) == len(wanted) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(found, wanted, strict=True)
    )


def case(number: int, folder: Path) -> None:
    rng = np.random.default_rng(number)
    kind = name(number)
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    within = "model" if kind == "contents" else kind
    shutil.copytree(folder / WHOLE / within, place / within)
    files = sorted(f for f in (place / within).rglob("*") if f.is_file() and f.name != ".lock")
    file = files[rng.integers(len(files))]
    if kind == "contents":
        edit(place / "model", rng)
    elif rng.random() < 0.8:
        file.write_bytes(DAMAGES[rng.integers(len(DAMAGES))](file.read_bytes(), rng))
    else:
        replace(file, files, rng)
    try:
        found = READERS[kind](place, folder)
    except (ValueError, OSError) as e:
        names = [str(place), *(f.name for f in files)]
        assert any(part in str(e) for part in names), f"refused without a name ({e})"
        assert kind != "cache" or file.is_dir(), f"not made again ({e})"
        return
    if kind != "contents":
        assert equal(found, EXPECTED[kind]), f"{file.name}: read as something else"
    else:
        assert all(t.isfinite().all() for t in found), "numbers that are none"


def replace(file: Path, files: list[Path], rng) -> None:
    r"""Something else in the place of a file."""
    way = rng.integers(5)
    content = file.read_bytes()
    file.unlink()
    if way == 1:
        file.mkdir()
    elif way == 2:
        file.symlink_to(file)  # a circle
    elif way == 3:
        others = [f for f in files if f != file]
        file.write_bytes(others[rng.integers(len(others))].read_bytes() if others else b"")
    elif way == 4:
        file.write_bytes(content.replace(b"0", b"1", 1))


def edit(folder: Path, rng) -> None:
    r"""A tensor or a setting is another one, and every checksum fits."""
    config = json.loads((folder / "config.json").read_text())
    if rng.random() < 0.7:
        tensors = load_file(folder / "model.safetensors")
        key = sorted(tensors)[rng.integers(len(tensors))]
        tensors[key] = spoilt(tensors[key], rng)
        if tensors[key] is None:
            del tensors[key]
        save_file(tensors, folder / "model.safetensors")
        with suppress(KeyError, AttributeError, TypeError):
            parts = tensors["template"].double(), tensors["faces"].long()
            content = b"".join(part.numpy().tobytes() for part in parts)
            config["template"] = hashlib.sha256(content).hexdigest()
    else:
        place: dict = config
        while True:
            key = sorted(place)[rng.integers(len(place))]
            if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        others = [None, -1, 0, 2**40, 1e300, "text", [], {}, [1, 2], True, float("nan"), "../../x"]
        place[key] = others[rng.integers(len(others))]
    if isinstance(config.get("files"), dict):
        for file in config["files"]:
            with suppress(OSError, TypeError):
                config["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    if config.pop("checksum", None) is not None:
        content = json.dumps(config, sort_keys=True).encode()
        config["checksum"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def spoilt(tensor: torch.Tensor, rng):
    way = rng.integers(9)
    if way == 0 and tensor.numel():
        bad = [float("nan"), float("inf")] if tensor.is_floating_point() else [-1, 2**40, -(2**63)]
        tensor.view(-1)[rng.integers(tensor.numel())] = bad[rng.integers(len(bad))]
    elif way == 1:
        return tensor.to([torch.int32, torch.float16, torch.bool, torch.float64][rng.integers(4)])
    elif way == 2:
        return tensor[:-1].clone() if tensor.dim() else None
    elif way == 3:
        return tensor.unsqueeze(0).clone()
    elif way == 4:
        return torch.cat([tensor, tensor]) if tensor.dim() else None
    elif way == 5:
        return tensor.flatten()[:0].clone()
    elif way == 6:
        return None
    elif way == 7:
        return tensor.t().contiguous() if tensor.dim() == 2 else tensor
    elif tensor.is_floating_point():
        return 2 * tensor
    return tensor
