"""Processes that need not import anew: forks of a server that has imported training."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def server() -> ForkServerContext:
    """Return what starts such processes; the server begins to import now, beside the caller's own work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffrl.train"])
    forkserver.ensure_running()
    return context
