"""One thread per test process: on a busy machine, threads that wait for each other cost more than
they gain.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import torch

torch.set_num_threads(1)
