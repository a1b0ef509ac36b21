r"""Models that come with the package, and those on the Hugging Face Hub (extra :obj:`hub`), in the
folder's format of :mod:`pyg_attnpool.models.storage`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from pyg_attnpool.models.storage import CARD, CONFIG, HIERARCHY, WEIGHTS, load, save

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel

# Models that come with the package (benchmarks/pretrained.py), by their names.
OWN = Path(__file__).parent.parent / "pretrained"

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def own_models() -> list[str]:
    r"""The names of the models that come with the package."""
    return sorted(path.name for path in OWN.iterdir() if path.is_dir()) if OWN.is_dir() else []


def from_pretrained(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    autoencoder: Module | None = None,
) -> MorphableModel:
    r"""Reads a model from a folder, this package or the Hub; see
    :meth:`MorphableModel.from_pretrained`."""
    own = own_models()
    if source in own:  # wherever it is called: "./faces" is a folder
        return load(OWN / source, autoencoder)
    if str(source) and Path(source).is_dir():
        return load(source, autoencoder)
    name = _repository(source, own)
    hub = _hub()
    with _named(name):
        folder = hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=[CONFIG, WEIGHTS, HIERARCHY, CARD],
            library_name="pyg_attnpool",
        )
    return load(folder, autoencoder)


def push_to_hub(
    model: MorphableModel,
    repository: str,
    private: bool = False,
    token: str | None = None,
    message: str = "A morphable model",
) -> str:
    r"""Writes a model to the Hub; see :meth:`MorphableModel.push_to_hub`."""
    name = _repository(repository)
    api = _hub().HfApi(token=token, library_name="pyg_attnpool")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name.split("/")[1]
        save(model, folder, name=name)
        with _named(name):
            api.create_repo(name, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(done.oid)


def _repository(name: Any, own: list[str] | None = None) -> str:
    if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
        names = f"one of {own}, " if own else ""
        raise ValueError(
            f"Expected {names}the folder of a model, or 'owner/name' of a repository on the "
            f"Hugging Face Hub (got {str(name)!r})"
        )
    return name


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as e:
        raise ImportError(
            "The Hugging Face Hub requires 'huggingface_hub': install it with "
            '`pip install "pyg_attnpool[hub]"`'
        ) from e
    return huggingface_hub


@contextmanager
def _named(name: str) -> Iterator[None]:
    # The errors of the Hub, of its client and of the connection as one line.
    from huggingface_hub.utils import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError as e:
        raise ValueError(
            f"Expected a repository {name} on the Hub (got none, or one that needs another token)"
        ) from e
    except RevisionNotFoundError as e:
        raise ValueError(f"Expected another revision of {name} (got one that it has not)") from e
    except HFValidationError as e:
        raise ValueError(f"Expected the name of a repository on the Hub (got {name}: {e})") from e
    except LocalEntryNotFoundError as e:
        raise ConnectionError(
            f"Expected {name} from the Hub (got no connection, and no copy of an earlier download)"
        ) from e
    except Exception as e:  # of the library that the client connects with, whichever it is
        raise ConnectionError(f"Expected an answer of the Hub for {name} (got: {e!r})") from e
