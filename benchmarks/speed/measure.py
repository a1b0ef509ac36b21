r"""What the measurements share: interleaved medians, peak memory, the floor of the machine, and
equality, which comes before any time."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results" / "speed"
CHECKED_SCORES = 1 << 29  # a search in double precision takes longer than what it checks
ROUNDING = 2e-6  # of a float32 cosine, with room for any order of summation


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    r"""The time of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], Any]], repeat: int, budget: float
) -> dict[str, float]:
    r"""Median times of functions called in turn, so that what slows the machine for a while slows
    all of them alike.

    Args:
        functions (dict): What is to be timed. Each is called once before.
        repeat (int): The number of rounds.
        budget (float): Seconds after which no further round begins; the first always runs.
    """
    times = rounds(functions, repeat, budget)
    return {name: statistics.median(t) for name, t in times.items()}


def rounds(
    functions: dict[str, Callable[[], Any]],
    repeat: int,
    budget: float,
    clock: Callable[[Callable[[], Any]], Any] = seconds,
) -> dict[str, list[Any]]:
    r"""The time of every call in :func:`interleaved`, as the clock takes it."""
    for function in functions.values():
        function()
    times: dict[str, list[Any]] = {name: [] for name in functions}
    start = time.perf_counter()
    order = list(functions)
    for number in range(repeat):
        random.Random(number).shuffle(order)  # none always follows the same one
        for name in order:
            times[name].append(clock(functions[name]))
        if time.perf_counter() - start > budget:
            break
    return times


class Memory:
    r"""The peak of memory above what was in use when this was made: the process's resident set,
    or what is allocated on a GPU."""

    def __init__(self, device: str | torch.device):
        self.cuda = torch.device(device).type == "cuda"
        self.before = self.reset()

    def reset(self) -> int | None:
        r"""Forgets earlier peaks. Returns the bytes in use, or :obj:`None` where a process cannot
        reset its peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed would else serve the next call unseen
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
        except (OSError, AttributeError):  # not Linux with glibc, or not allowed
            return None

    def peak(self) -> int | None:
        r"""Bytes, or :obj:`None` where they cannot be known."""
        if self.before is None:
            return None
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"Expected {name} in /proc/self/status")


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> int | None:
    r"""The bytes that a call holds at most, its result included."""
    memory = Memory(device)
    result = function()
    peak = memory.peak()
    del result
    return peak


def floor(device: str | torch.device, size: int | None = None) -> dict[str, float]:
    r"""What the machine can do: bytes moved per second in a copy, read and written, of :obj:`size`
    bytes or as many as no cache holds, and operations per second in a large float32 product."""
    cuda = torch.device(device).type == "cuda"
    size = 1 << (30 if cuda else 28) if size is None else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192 if cuda else 2048, 8192 if cuda else 2048, device=device)
    functions = {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}
    times = rounds(functions, 21, 10.0)
    return {
        "bytes_per_s": 2 * source.numel() / min(times["copy"]),
        "flop_per_s": 2 * matrix.size(0) ** 3 / min(times["product"]),
    }


def equal(name: str, found: Tensor, expected: Tensor, rtol: float) -> float:
    r"""The largest difference over the largest magnitude, a number below :obj:`rtol`.

    Raises:
        ValueError: If it is not.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"Expected {name} of shape {list(expected.shape)} (got {list(found.shape)})"
        )
    difference = _magnitude(found - expected) / _magnitude(expected)
    if not difference <= rtol:  # so that NaN does not pass
        raise ValueError(
            f"Expected {name} to differ by at most {rtol:.0e} of the largest magnitude "
            f"(got {difference:.2e})"
        )
    return difference.item()


def _magnitude(x: Tensor) -> Tensor:
    low, high = x.aminmax()  # no copy, as these may be gigabytes
    return torch.maximum(-low, high)


def equal_topk(
    name: str, index: Tensor, query: Tensor, key: Tensor, max_scores: int = CHECKED_SCORES
) -> float:
    r"""Checks a search against cosines in double precision. The scores at the chosen keys must be
    the largest within rounding, and where the gaps to the ranks before and after are beyond it,
    the chosen keys must be the same.

    Args:
        name (str): What made the search, for the error.
        index (torch.Tensor): The chosen keys :obj:`[M, k]` in descending order.
        query (torch.Tensor): Queries :obj:`[M, c]`.
        key (torch.Tensor): Keys :obj:`[N, c]`.
        max_scores (int, optional): Beyond so many scores, only a random sample of the rows is
            checked. (default: :obj:`CHECKED_SCORES`)

    Returns:
        The share of the chosen keys that gaps determine.

    Raises:
        ValueError: If the search is wrong.
    """
    num_query, num_key, k = query.size(0), key.size(0), index.size(1)
    query, key = (F.normalize(t.detach().double(), dim=-1) for t in (query, key))
    checked = min(num_query, max(1, max_scores // num_key))
    rows = torch.randperm(num_query, device=index.device)[:checked]
    determined = 0
    for row in rows.split(max(1, (1 << 20) // num_key)):
        score, chosen = query[row] @ key.t(), index[row]
        value, wanted = score.topk(min(k + 1, num_key))
        if not (chosen.sort(dim=1).values.diff(dim=1) > 0).all():
            raise ValueError(f"Expected {name} to choose different keys in a row (got one twice)")
        error = (score.gather(1, chosen) - value[:, :k]).abs().max()
        if not error <= ROUNDING:
            raise ValueError(f"Expected {name} to choose the largest scores (got {error:.2e} less)")
        gap = F.pad(-value.diff(dim=1), (1, int(k == num_key)), value=torch.inf)
        clear = gap > 2 * ROUNDING
        clear = clear[:, :-1] & clear[:, 1:]
        if ((chosen != wanted[:, :k]) & clear).any():
            raise ValueError(f"Expected {name} to keep the order of scores (got another)")
        determined += int(clear.sum())
    return determined / (checked * k)
