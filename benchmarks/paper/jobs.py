r"""Runs one by one, or side by side in processes."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.data import Meshes
from benchmarks.paper.options import Options
from benchmarks.paper.run import Run, train
from pyg_attnpool.training import quiet_lightning


def folder_of(run: Run, output: Path) -> Path:
    r"""Where a run keeps what it needs to go on."""
    return output / "unfinished" / run.key


def trained(
    runs: list[Run], meshes: dict[str, Meshes], output: Path, device: str, options: Options
) -> Generator[tuple[Run, dict[str, Any]], None, None]:
    r"""Runs and what they measured, in the order in which they end."""
    if options.jobs == 1:
        for run in runs:
            folder = folder_of(run, output)
            yield run, train(run, meshes[run["data"]], folder, device, options.resume)
        return
    # Processes and not threads, which would wait for each other's Python.
    threads = max(1, torch.get_num_threads() // options.jobs)
    pool = ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), _begin, (options, threads)
    )
    try:
        futures = {
            pool.submit(_train_here, run, folder_of(run, output), device, options.resume): run
            for run in runs
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # After an error nobody waits for what the others train; a resumed sweep goes on with it.
        for child in multiprocessing.active_children():
            child.kill()  # a signal that Lightning does not catch
        pool.shutdown(cancel_futures=True)


# What a process that trains beside others has opened: the same files, mapped to memory.
_meshes: dict[str, Meshes] = {}


def _begin(options: Options, threads: int):
    # A sweep that is killed must not leave behind what writes to the folders of its runs.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    quiet_lightning()
    sys.stdout = open(os.devnull, "w")  # bars of several trainings would overwrite each other
    _meshes.update((name, Meshes(name, options)) for name in options.data)


def _train_here(run: Run, folder: Path, device: str, resume: bool) -> dict[str, Any]:
    return train(run, _meshes[run["data"]], folder, device, resume)
