r"""Units of length. Meshes are held in metres, files in the unit that their maker chose."""

METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}


def metres(unit: str) -> float:
    r"""The length of a unit in metres.

    Raises:
        ValueError: If the unit is none of :obj:`"m"`, :obj:`"cm"` and :obj:`"mm"`.

    Example:
        >>> metres("mm")
        0.001
    """
    if unit not in METRES:
        raise ValueError(f"Expected 'unit' to be one of {list(METRES)} (got {unit!r})")
    return METRES[unit]
