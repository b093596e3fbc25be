"""One thread per test process: on a busy machine, threads that wait for each other cost more than
they gain. Finished runs are made once for all test processes.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

from collections.abc import Callable
from functools import partial
from pathlib import Path

import first_losses
import pytest
import runs
import several
import torch

torch.set_num_threads(1)
runs.draw_scenes_once()


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all test processes have."""
    top = tmp_path_factory.getbasetemp()
    return top.parent if "PYTEST_XDIST_WORKER" in os.environ else top


@pytest.fixture(scope="session")
def finished(shared) -> Callable[[str], Path]:
    """finished(name) is the folder of a finished run of `first_losses.RUNS`, which a test copies
    before it changes anything.
    """
    return partial(first_losses.kept, shared / "finished")


@pytest.fixture(scope="session")
def launched(shared, finished) -> Callable[[int], Path]:
    """launched(2) and launched(3) are the folders of what so many processes left (several.py)."""
    return partial(several.launched, shared, finished)
