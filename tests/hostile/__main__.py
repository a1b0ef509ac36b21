r"""Runs cases of a family: ``python -m tests.hostile FAMILY START STOP``. Each is announced by its
name before it runs, so that the last line of a process that died tells what killed it."""

import importlib
import io
import json
import sys
import tempfile
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path

MEMORY = 256 << 20  # more than the process has when the first case begins, for small cases


def limit_memory(num_bytes: int) -> None:
    r"""Lets the process take only some bytes more than it has, where the system can."""
    with suppress(ImportError, FileNotFoundError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))


def main(family: str, start: int, stop: int) -> None:
    module = importlib.import_module(f"tests.hostile.{family}")

    def tell(**found):
        print(json.dumps(found), file=sys.__stdout__, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if hasattr(module, "prepare"):
            with redirect_stdout(io.StringIO()):
                module.prepare(Path(folder))
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`torch.jit")
        limit_memory(getattr(module, "MEMORY", MEMORY))
        for number in range(start, stop):
            tell(name=module.name(number))
            verdict, said = "held", ""
            try:
                with redirect_stdout(io.StringIO()):
                    module.case(number, Path(folder))
            except AssertionError as e:
                verdict, said = "wrong", str(e)[:300]
            except MemoryError:
                verdict = "out of memory"
            except Exception as e:
                verdict, said = "another error", f"{type(e).__name__}: {e}"[:300]
            tell(verdict=verdict, said=said)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
