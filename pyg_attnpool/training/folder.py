r"""The folder of a training: a lock, and checkpoints that are whole and of one run."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import Module

from pyg_attnpool.files import replacing

BEST, LAST, LOCK = "best.ckpt", "last.ckpt", ".lock"
CHECKSUM = 64  # bytes of a SHA-256 in hexadecimal digits


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    r"""Makes a folder that no other training writes to meanwhile. The system releases the lock of
    a process that is killed. Its file stays: another training may be waiting at it already.

    Raises:
        ValueError: If a training writes to the folder, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise ValueError(f"Expected a folder as 'output' (got the file in {folder})") from e
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ValueError(
            f"Expected a folder that no training writes to (got {folder}, where one is running)"
        ) from e
    try:
        yield
    finally:
        lock.release()


# Whole ################################################################################


def save_checkpoint(
    checkpoint: dict[str, Any], path: Path, replaces: Callable[[], None] | None = None
) -> None:
    r"""Writes a checkpoint beside its target and renames it: a kill leaves the last whole one.
    It is an archive of :func:`torch.save` whose comment is the SHA-256 of all before it.

    Args:
        checkpoint (dict): Values that :func:`torch.load` reads without unpickling.
        path (Path): The file.
        replaces (callable, optional): Called when all is written, right before the file takes its
            place. (default: :obj:`None`)
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    archive = buffer.getvalue()
    # The archive ends in the length of its comment, which PyTorch leaves empty.
    content = archive[:-2] + struct.pack("<H", CHECKSUM)
    with replacing(path) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
        if replaces is not None:
            replaces()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    r"""Reads a checkpoint file of :func:`~pyg_attnpool.training.fit` onto the CPU.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, also by a single bit, or something else.

    Example:
        >>> from pyg_attnpool.training import load_checkpoint
        >>> load_checkpoint("runs/mine/best.ckpt")["epoch"]  # doctest: +SKIP
        211
    """
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-CHECKSUM]).hexdigest().encode() != content[-CHECKSUM:]:
        raise ValueError(
            f"Expected a whole checkpoint in {path} (got another checksum: it is damaged, or "
            f"something else)"
        )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many types, none of which names the file
        raise ValueError(f"Expected a whole checkpoint in {path} (got {e})") from e
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"Expected a training checkpoint in {path} (got something else)")
    return checkpoint


# Of one run ###########################################################################


def load_last(folder: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    r"""Reads the checkpoint to go on from.

    Args:
        folder (Path): The folder of the training.
        check (callable): Raises a :class:`ValueError` for a checkpoint of another run.

    Raises:
        ValueError: If one of the two checkpoints is damaged, of another run, or missing.
    """
    last, best = folder / LAST, folder / BEST
    try:
        checkpoint = load_checkpoint(last)
    except ValueError as e:
        try:
            good = load_checkpoint(best)
            check(good)
        except (OSError, ValueError):
            raise ValueError(f"{e}: train without resuming") from e
        raise ValueError(
            f"{e}: {best} is whole, of the same run and of the end of epoch {good['epoch'] + 1}; "
            f"copy it to {last.name} to go on from there"
        ) from e
    check(checkpoint)
    try:
        check(load_checkpoint(best))
    except FileNotFoundError as e:
        raise ValueError(f"Expected {best} beside {last.name} (got no such file)") from e
    return checkpoint


def architecture(module: Module) -> dict[str, Any]:
    r"""The description of a network beside its weights: its class, and its :obj:`config` where it
    has one, else the numbers, names and functions among the attributes of its layers."""
    config = getattr(module, "config", None)
    if is_dataclass(config):
        found = {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    else:
        found = {
            f"{name}.{key}".lstrip("."): plain(value)
            for name, layer in module.named_modules()
            for key, value in vars(layer).items()
            if not key.startswith("_") and key != "training" and _is_setting(value)
        }
    return {"type": _name(type(module)), **found}


def _is_setting(value: Any) -> bool:
    return isinstance(value, str | bool | int | float) or (
        callable(value) and not isinstance(value, Module | Tensor)
    )


def plain(value: Any) -> Any:
    r"""A setting as numbers, strings, lists and dictionaries of them; of functions and classes
    their name."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, partial):
        return {"function": plain(value.func), "args": plain(value.args), **plain(value.keywords)}
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return plain(value.tolist()) if value.numel() < 10 else f"a tensor {list(value.shape)}"
    return _name(value if hasattr(value, "__qualname__") else type(value))


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, None if isinstance(value, Mapping) else value


def _of_all_processes(settings: dict[str, Any] | None) -> dict[str, Any]:
    # However many processes share a batch, the steps are the same.
    found = dict(settings or {})
    if "batch_size" in found:
        batch_size, processes = found.pop("batch_size"), found.pop("processes", 1)
        found["batch_size * processes"] = batch_size * processes
    return found


def check_settings(
    checkpoint: dict[str, Any],
    settings: dict[str, Any],
    state: Mapping[str, Tensor],
    longer: bool = False,
) -> None:
    r"""Raises a :class:`ValueError` if a checkpoint is of a run of other settings or of another
    model, and names the first that differs.

    Args:
        checkpoint (dict): The checkpoint.
        settings (dict): The settings of this run, nested.
        state (dict): The state of this run's module, of which the shapes count.
        longer (bool, optional): Whether more epochs may follow. (default: :obj:`False`)
    """
    here, stored = (
        dict(_flat(_of_all_processes(found))) for found in (settings, checkpoint.get("settings"))
    )
    for name in here | stored:
        value, got = here.get(name), stored.get(name)
        if value == got or (longer and name == "epochs" and got is not None and got <= value):
            continue
        why = ", as the learning rate depends on their number" if name == "epochs" else ""
        raise ValueError(
            f"Expected a checkpoint of a run with {name}={value!r} (got {got!r}){why}: train into "
            f"another folder, or without resuming"
        )
    have = {name: tuple(t.shape) for name, t in state.items()}
    found = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
    if have != found:
        name = min(set(have.items()) ^ set(found.items()))[0]
        raise ValueError(
            f"Expected a checkpoint of this model, with '{name}' of shape {have.get(name)} "
            f"(got {found.get(name)})"
        )


def check_data(checkpoint: dict[str, Any], data: dict[str, Any]) -> None:
    r"""Raises a :class:`ValueError` if a checkpoint is of a run on other meshes, and says in which
    value they differ. Numbers that two machines round differently count as the same.

    Args:
        checkpoint (dict): The checkpoint.
        data (dict): Hashes, and statistics of the meshes, of this run, nested.
    """
    here, stored = dict(_flat(data)), dict(_flat(checkpoint.get("data") or {}))
    for name, value in here.items():
        got = stored.get(name)
        if isinstance(value, Tensor) and isinstance(got, Tensor):
            away = (value - got).abs()
            if away.max() <= 2.0**-22 * value.abs().max():
                continue
            place = tuple(int(i) for i in torch.unravel_index(away.argmax(), away.shape))
            name, value, got = f"{name}{list(place)}", value[place].item(), got[place].item()
        elif not isinstance(value, Tensor) and value == got:
            continue
        raise ValueError(
            f"Expected a checkpoint of a run with {name}={value!r} (got {got!r}): train into "
            f"another folder, or without resuming"
        )
