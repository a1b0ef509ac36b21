r"""How a page of :obj:`web/` stores what Python tells it: a description in JSON, and all arrays in
one compressed block."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.sparse import csr_array


def fill_page(
    name: str,
    title: str,
    content: dict[str, Any],
    quantised: Collection[str] = (),
    body: str = "",
) -> str:
    r"""The text of a page.

    Args:
        name (str): The page in :obj:`web/`.
        title (str): Its title.
        content (dict): What its script reads: numbers, text, arrays, sparse matrices, dataclasses,
            and lists and dictionaries of them.
        quantised (list, optional): Names of arrays of floats that are stored as multiples of
            1/32767 of their largest entry. All others are float32. (default: :obj:`()`)
        body (str, optional): HTML in the middle of the page. (default: :obj:`""`)
    """
    arrays = _Arrays(quantised)
    description = {"content": arrays.described("", content), "arrays": arrays.entries}
    # No text of the content may end its block.
    described = json.dumps(description).replace("<", "\\u003c")
    data = base64.b64encode(gzip.compress(bytes(arrays.data), 9, mtime=0)).decode()
    page = (files("pyg_attnpool.visualize") / "web" / f"{name}.html").read_text("utf-8")
    for mark, text in (
        ("<!--title-->", html.escape(title)),
        ("<!--body-->", body),
        ("<!--model-->", f'<script type="application/json" id="model">{described}</script>'),
        ("<!--arrays-->", f'<script type="application/gzip" id="arrays">{data}</script>'),
    ):
        page = page.replace(mark, text, 1)
    return page


def read_page(page: str, types: Mapping[str, type] | None = None) -> dict[str, Any]:
    r"""The content of a page, read back.

    Args:
        page (str): The text of the page.
        types (dict, optional): Dataclasses by name. (default: :obj:`None`)

    Raises:
        ValueError: If the text is no such page.
    """
    blocks = re.findall(r'<script type="[^"]*" id="(model|arrays)">(.*?)</script>', page, re.S)
    found = dict(blocks)
    if set(found) != {"model", "arrays"}:
        raise ValueError(f"Expected a page of pyg_attnpool (got blocks {sorted(found)})")
    description = json.loads(found["model"])
    data = gzip.decompress(base64.b64decode(found["arrays"]))
    arrays = []
    for entry in description["arrays"]:
        count = int(np.prod(entry["shape"]))
        array = np.frombuffer(data, entry["dtype"], count, entry["offset"]).reshape(entry["shape"])
        arrays.append(array * entry["scale"] if entry["scale"] else array)
    return _restored(description["content"], arrays, types or {})


class _Arrays:
    # All arrays of a page in one block of bytes. Equal ones, such as a matrix of two layers, once.
    def __init__(self, quantised: Collection[str]):
        self.quantised = quantised
        self.entries: list[dict[str, Any]] = []
        self.data = bytearray()
        self.known: dict[tuple[Any, ...], int] = {}

    def described(self, name: str, value: Any) -> Any:
        r"""A value as JSON holds it, with its arrays set aside."""
        if isinstance(value, ndarray):
            return {"array": self._add(value, name in self.quantised)}
        if isinstance(value, csr_array):
            parts = {"rowptr": value.indptr, "col": value.indices, "value": value.data}
            parts = {key: self.described(key, part) for key, part in parts.items()}
            return {**parts, "shape": list(value.shape)}
        if is_dataclass(value):
            parts = {f.name: self.described(f.name, getattr(value, f.name)) for f in fields(value)}
            return {"op": type(value).__name__, **parts}
        if isinstance(value, dict):
            return {key: self.described(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.described(name, item) for item in value]
        return value

    def _add(self, array: ndarray, quantised: bool) -> int:
        scale = 0.0
        if array.dtype.kind == "f" and quantised:
            scale = float(np.abs(array).max(initial=0)) / 32767 or 1.0
            array = np.rint(array / scale).astype("<i2")
        elif array.dtype.kind == "f":
            array = array.astype("<f4")
        else:
            low, high = array.min(initial=0), array.max(initial=0)
            array = array.astype("<u2" if 0 <= low and high < 2**16 else "<i4")
        content = np.ascontiguousarray(array).tobytes()
        key = (array.dtype.str, array.shape, scale, hashlib.sha256(content).digest())
        if key not in self.known:
            self.known[key] = len(self.entries)
            entry = {"dtype": array.dtype.name, "shape": list(array.shape), "scale": scale}
            self.entries.append({**entry, "offset": len(self.data)})
            self.data += content + bytes(-len(content) % 4)  # every array begins at a whole word
        return self.known[key]


def _restored(node: Any, arrays: list[ndarray], types: Mapping[str, type]) -> Any:
    if isinstance(node, list):
        return [_restored(item, arrays, types) for item in node]
    if not isinstance(node, dict):
        return node
    if "array" in node:
        return arrays[node["array"]]
    node = {key: _restored(item, arrays, types) for key, item in node.items()}
    if "rowptr" in node:
        return csr_array((node["value"], node["col"], node["rowptr"]), shape=node["shape"])
    kind = types.get(node.pop("op", None))
    return node if kind is None else kind(**node)
