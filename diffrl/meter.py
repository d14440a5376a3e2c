"""What work costs on this machine: its clock, and the most memory held so far."""

import resource
import time

import torch


def now(cuda: bool) -> float:
    """Return the time in seconds, when a GPU has done what it was given."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(cuda: bool) -> float:
    """Return the peak so far, bytes: of PyTorch's allocator on a GPU, of the process on a CPU."""
    if cuda:
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
