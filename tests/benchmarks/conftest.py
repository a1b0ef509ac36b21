import pytest


@pytest.fixture
def one_thread(num_threads):
    r"""Threads of two processes on the same cores wait for each other."""
    num_threads(1)
