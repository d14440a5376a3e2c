"""A black box that does not answer must not hold up a run for ever."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


class NoAnswerError(Exception):
    """A call has not come back in its time."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, or raise what it raises, as if it were called here.

    It is called in a thread of its own. Python cannot end one that hangs: it is left behind, and as a
    daemon it does not keep the process from ending. A call that never lets go of the interpreter's lock, in
    an extension's endless loop, holds up this one too.

    Raises:
        NoAnswerError: it has not come back after so many `seconds`.
    """
    answer: Future[T] = Future()
    gradients = torch.is_grad_enabled()  # each thread has its own, and its own current device
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(gradients):
                answer.set_result(call())
        except BaseException as error:  # the caller's to judge
            answer.set_exception(error)

    Thread(target=work, daemon=True, name="reward").start()
    if not wait([answer], seconds).done:
        raise NoAnswerError
    return answer.result()
