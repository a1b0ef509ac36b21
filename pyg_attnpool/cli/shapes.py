r"""Commands that make meshes: new ones, ones between others, ones that fit something, and whole
ones of broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from pyg_attnpool.cli.shared import (
    Model,
    Output,
    as_json,
    check_output,
    decimal,
    note,
    read_json,
    read_model,
    read_shape,
    write_meshes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pyg_attnpool import MorphableModel
    from pyg_attnpool.fitting import Fit

Suffix = Literal["ply", "obj", "off", "stl"]
Motion = Literal["rigid", "similarity", "none"]
Place = tuple[int, float, float, float]
MESHES = tuple(f".{name}" for name in get_args(Suffix))
FILMS = (".gif", ".mp4")
FRAMES = 50  # of an animation, by default


def sample(
    model: Model, *, output: Output, n: int = 10, seed: int = 0, format: Suffix = "ply"
) -> None:
    """Makes new meshes, from the Gaussian of the codes of the training meshes.

    Example: pyg-attnpool sample faces/ -o new/ --n 20

    Args:
        output: Folder of the meshes.
        n: How many.
        seed: Seed of chance: the same gives the same meshes.
        format: Format of the files.
    """
    import torch

    from pyg_attnpool.arguments import as_integer

    check_output(output, folder=True)
    as_integer("--n", n, least=1)
    as_integer("--seed", seed, least=0)
    found = read_model(model)
    meshes = found.sample(n, generator=torch.Generator().manual_seed(seed))
    write_meshes(found, output, _numbered("sample", n, format), meshes)
    print(f"{n} meshes are in {output}")


def interpolate(
    model: Model,
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    *,
    output: Output,
    steps: int | None = None,
    format: Suffix = "ply",
    azimuth: float = 20.0,
) -> None:
    """Makes the meshes between two: files of meshes, or one animation.

    Example: pyg-attnpool interpolate faces/ anna.ply ben.ply -o walk.gif

    Args:
        a: Mesh file of the model's template to start from, or a .json file with a latent code.
        b: The one to end with.
        output: Folder of the meshes, or a .gif or .mp4 file.
        steps: How many meshes, both ends among them; by default 10, of an animation 50.
        format: Format of the files.
        azimuth: How far the mesh of an animation is turned about y, in degrees.
    """
    from pyg_attnpool.arguments import as_integer

    check_output(output, FILMS, folder=True)
    film = output.suffix.lower() in FILMS
    steps = as_integer("--steps", (FRAMES if film else 10) if steps is None else steps, least=2)
    found = read_model(model)
    meshes = found.interpolate(read_shape(found, a), read_shape(found, b), steps)
    if film:
        _animate(found, output, meshes, azimuth)
    else:
        write_meshes(found, output, _numbered("step", steps, format), meshes)
    print(f"{steps} {'frames' if film else 'meshes'} are in {output}")


def transfer(
    model: Model,
    source_neutral: Annotated[Positional[Path], arg(metavar="SOURCE_NEUTRAL")],
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    target_neutral: Annotated[Positional[Path], arg(metavar="TARGET_NEUTRAL")],
    *,
    output: Output,
) -> None:
    """Gives a mesh the deformation of another: one person's face with the expression of the other.

    Example: pyg-attnpool transfer faces/ anna.ply anna_smiles.ply ben.ply -o ben_smiles.ply

    Args:
        source_neutral: The undeformed source, a mesh file or a .json file with a latent code.
        source: The deformed source.
        target_neutral: The undeformed target.
        output: The mesh file to write.
    """
    check_output(output, MESHES)
    found = read_model(model)
    shapes = [read_shape(found, path) for path in (source_neutral, source, target_neutral)]
    found.write_mesh(output, found.transfer(*shapes))
    print(output)


def fit(
    model: Model,
    scan: Annotated[Positional[Path], arg(metavar="SCAN")],
    *,
    output: Output,
    landmarks: Path | None = None,
    motion: Motion = "rigid",
    noise: float = 1.0,
    anyway: bool = False,
    resume: bool = False,
    json: bool = False,
) -> int:
    """Registers scans of any topology, and point clouds: finds the mesh of the model that fits
    each, with the vertices and faces of the template, where the scan is.

    A scan that the model does not come to explain is named, nothing is written for it, and the exit
    code is 1.

    Example: pyg-attnpool fit faces/ scan.ply -o registered.ply

    Args:
        scan: File of a mesh or of points in the unit of the model's files, or a folder of them.
            Points are a .ply, .obj or .off file without faces; an .xyz file, x y z in a line, or
            x y z and a unit normal; or an .npy array [P, 3] or [P, 6] of the same.
        output: The mesh file to write; of a folder of scans a folder, where each has its name.
        landmarks: A .json file of positions by vertex of the template, as in {"17": [0, 1.5, 3]},
            in the unit of the files; of a folder of scans a folder, where each has its name.
        motion: What the model may do beside changing its shape.
        noise: Standard deviation of the scan about the model in millimetres. Larger means closer to
            the mean shape.
        anyway: Write what does not fit too.
        resume: Leave out scans that have their mesh already.
        json: Print codes, motions and distances as JSON: lengths in metres, distances in
            millimetres.
    """
    from pyg_attnpool.datasets.cache import progress

    jobs = _jobs(scan, output, landmarks, resume)
    found = read_model(model)
    records = []
    # The fit of a single scan has a bar of its own.
    for source, target, marks in progress(jobs, f"Fitting {scan.name}") if scan.is_dir() else jobs:
        try:
            known = None if marks is None else _landmarks(found, marks)
            fitted = found.fit_to(source, landmarks=known, motion=motion, noise=noise / 1000)
            record = _record(source, target, fitted)
            if not (record["converged"] or anyway):
                raise ValueError(
                    f"Expected a scan that the model explains (got {source}, whose fit has not "
                    f"converged, with a median of {record['median']:.1f} mm): try landmarks, a "
                    f"larger --noise, or --anyway to see what became of it"
                )
            found.write_mesh(target, fitted.mesh)
        except (OSError, TypeError, ValueError) as e:
            if not scan.is_dir():
                raise
            note(f"pyg-attnpool: {e}")
            record = {"scan": str(source), "error": str(e)}
        records.append(record)
    failed = sum("error" in record for record in records)
    if json:
        print(as_json(records if scan.is_dir() else records[0]))
    elif scan.is_dir():
        print(f"{len(records) - failed} of {len(records)} scans are registered in {output}")
    else:
        (record,) = records
        mean, median = decimal(record["mean"]), decimal(record["median"])
        print(f"{output}: {mean} mm from the scan, median {median}")
    return 1 if failed else 0


def edit(
    model: Model,
    mesh: Annotated[Positional[Path], arg(metavar="MESH")],
    *,
    output: Output,
    to: UseAppendAction[tuple[Place, ...]] = (),
    by: UseAppendAction[tuple[Place, ...]] = (),
    keep: tuple[int, ...] = (),
    noise: float = 1.0,
    json: bool = False,
) -> None:
    """Moves some vertices of a mesh and takes along what belongs to them in the model.

    Example: pyg-attnpool edit faces/ face.ply -o longer.ply --by 17 0 0 5

    Args:
        mesh: Mesh file of the model's template, or a .json file with a latent code.
        output: The mesh file to write.
        to: Vertex, and where it shall go, x y z in the unit of the files. May be given many times.
        by: Vertex, and how far it shall go. May be given many times.
        keep: Vertices that must stay.
        noise: How far from its target a vertex may end, in millimetres: the smaller, the more gives
            way to it.
        json: Print the code, and the distance of each vertex from its target in millimetres.
    """
    import torch

    from pyg_attnpool.units import metres

    check_output(output, MESHES)
    found = read_model(model)
    scale, shape = metres(found.unit), read_shape(found, mesh)
    start = found.decode(shape.unsqueeze(0))[0] if shape.dim() == 1 else shape
    moved = [v for v, *_ in (*to, *by)]
    for name, vertices in (("--to and --by", moved), ("--keep", keep)):
        wrong = [v for v in vertices if not 0 <= v < found.num_vertices]
        if wrong:
            raise ValueError(
                f"Expected vertices from 0 to {found.num_vertices - 1} as {name} (got {wrong[0]})"
            )
    if not moved or len(set(moved)) < len(moved):
        raise ValueError(f"Expected --to or --by of different vertices (got {moved})")
    targets = {v: scale * torch.tensor(place) for v, *place in to}
    targets |= {v: start[v, :3] + scale * torch.tensor(step) for v, *step in by}
    stays = None
    if keep:
        stays = torch.zeros(found.num_vertices)
        stays[list(keep)] = 1
    fitted = found.edit(shape, targets, stays, noise=noise / 1000)
    found.write_mesh(output, fitted.mesh)
    distances = dict(zip(targets, fitted.residuals.tolist(), strict=True))
    if json:
        print(as_json({"mesh": str(output), "code": fitted.code.tolist(), "residuals": distances}))
    else:
        print(output)
        for vertex, distance in distances.items():
            print(f"vertex {vertex} is {distance:.3f} mm from where it should be")


def repair(
    meshes: Annotated[Positional[Path], arg(metavar="MESHES")],
    *,
    output: Output,
    merge: float = 0.0,
    no_stitch: bool = False,
) -> None:
    """Makes a manifold of any triangles, as templates need it. No vertex moves. The meshes of a
    folder are repaired all alike, so that they stay registered.

    Example: pyg-attnpool repair scans/ -o whole/

    Args:
        meshes: Mesh file, or folder of mesh files with the same vertices in the same order.
        output: Mesh file or folder to write; beside the meshes of a folder index.npy, which has the
            vertex before that each vertex is.
        merge: Distance up to which the ends of edges at a seam are one vertex, in the unit of the
            files.
        no_stitch: Leave seams open.
    """
    from pyg_attnpool.datasets import repair_files

    _check_like(meshes, output)
    if no_stitch and merge != 0:
        raise ValueError(f"Expected --merge or --no-stitch (got both, with --merge {merge})")
    mesh, count = repair_files(meshes, output, None if no_stitch else merge)
    for what, number in mesh.changes.items():
        print(f"{number:8,} {what}")
    print(
        f"{count} {'files' if count > 1 else 'file'} of {mesh.num_source:,} vertices, now "
        f"{len(mesh.vertices):,}, in {output}"
    )


# What they share ######################################################################


def _check_like(source: Path, output: Path) -> None:
    # A folder becomes a folder, a file a mesh file.
    if not source.exists():
        raise FileNotFoundError(f"Expected a file or a folder of meshes at {source} (got none)")
    check_output(output, () if source.is_dir() else MESHES, folder=source.is_dir())


def _numbered(name: str, n: int, suffix: str) -> list[str]:
    return [f"{name}_{i:0{len(str(n - 1))}}.{suffix}" for i in range(n)]


def _animate(model: MorphableModel, path: Path, meshes: Tensor, azimuth: float) -> None:
    from pyg_attnpool.datasets.cache import progress
    from pyg_attnpool.visualize import render, view_box, write_animation

    box = view_box(meshes[..., :3], azimuth)
    frames = (
        render(mesh[:, :3], model.faces, azimuth=azimuth, box=box)
        for mesh in progress(meshes, f"Drawing {path.name}")
    )
    write_animation(path, frames)


def _jobs(
    scan: Path, output: Path, landmarks: Path | None, resume: bool
) -> list[tuple[Path, Path, Path | None]]:
    # Every scan with the mesh that it becomes and its landmarks.
    from pyg_attnpool.datasets.sources import mesh_names
    from pyg_attnpool.mesh.io import CLOUDS, SUFFIXES

    _check_like(scan, output)
    if not scan.is_dir():
        if output.resolve() == scan.resolve():
            raise ValueError(f"Expected another file than the scan to write to (got {output})")
        return [(scan, output, landmarks)]
    if landmarks is not None and not landmarks.is_dir():
        raise ValueError(f"Expected a folder of landmarks of a folder of scans (got {landmarks})")
    if output.resolve() == scan.resolve():
        raise ValueError(f"Expected another folder than that of the scans (got {output})")
    names = [Path(name) for name in mesh_names(scan, (*SUFFIXES, *CLOUDS))]
    # Numbers beside a mesh of the same name are its own, and no scan.
    meshes = {name.with_suffix("") for name in names if name.suffix.lower() in SUFFIXES}
    names = [
        name
        for name in names
        if name.suffix.lower() in SUFFIXES or name.with_suffix("") not in meshes
    ]
    jobs = [
        (
            scan / name,
            output / name.with_suffix(".ply"),
            None if landmarks is None else landmarks / name.with_suffix(".json"),
        )
        for name in names
    ]
    if len({target for _, target, _ in jobs}) < len(jobs):
        raise ValueError(f"Expected scans of different names in {scan} (got the same name twice)")
    return [job for job in jobs if not (resume and job[1].exists())]


def _landmarks(model: MorphableModel, path: Path) -> dict[int, Any]:
    import torch

    from pyg_attnpool.units import metres

    known = read_json(path)
    try:
        positions = {int(vertex): torch.tensor(place) for vertex, place in known.items()}
        places = torch.stack(list(positions.values())).double()
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f'Expected landmarks as {{"17": [0, 1.5, 3], ...}} in {path} (got: {e})'
        ) from e
    return dict(zip(positions, metres(model.unit) * places, strict=True))


def _record(source: Path, target: Path, fitted: Fit) -> dict[str, Any]:
    distances = fitted.residuals[~fitted.residuals.isnan()]
    return {
        "scan": str(source),
        "mesh": str(target),
        "converged": bool(fitted.converged),
        "mean": distances.mean().item(),
        "median": distances.median().item(),
        "code": fitted.code.tolist(),
        "rotation": fitted.rotation.tolist(),
        "translation": fitted.translation.tolist(),
        "scale": fitted.scale.item(),
    }
