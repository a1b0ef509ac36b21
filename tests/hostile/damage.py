r"""What disks, networks and people do to the bytes of any file."""

import numpy as np


def cut(data, rng):
    return data[: rng.integers(len(data))]


def flip_bits(data, rng):
    data = np.frombuffer(data, np.uint8).copy()
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return data.tobytes()


def flip_near_the_ends(data, rng):
    # Where headers and directories of archives are.
    data = np.frombuffer(data, np.uint8).copy()
    place = rng.integers(min(160, len(data)))
    data[place if rng.random() < 0.5 else -1 - place] ^= 1 << rng.integers(8)
    return data.tobytes()


def replace_the_header(data, rng):
    size = rng.integers(1, min(200, len(data)))
    return rng.bytes(size) + data[size:]


def replace_a_part(data, rng):
    start, end = np.sort(rng.integers(0, len(data) + 1, 2))
    return data[:start] + rng.bytes(rng.integers(40)) + data[end:]


def lengthen(data, rng):
    return data + rng.bytes(rng.integers(1, 100))


def garbage(data, rng):
    return rng.bytes(rng.integers(0, 300))


DAMAGES = [
    cut,
    flip_bits,
    flip_near_the_ends,
    replace_the_header,
    replace_a_part,
    lengthen,
    garbage,
]


def damaged(data, number, seed):
    r"""Damaged copies of some bytes, all kinds in turn, the same ones for a seed."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        yield DAMAGES[i % len(DAMAGES)](data, rng)
