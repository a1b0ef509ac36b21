r"""Runs a part of a test in a process of its own."""

import faulthandler
import os
import signal
import traceback

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def status_of_child(function):
    r"""What a forked process ends with: 0, 1 after an exception, or minus a signal."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        signal.alarm(30)  # a lock that is held would be waited for
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
