"""A rank that raises ends the whole job, within seconds, with its traceback, rank and host last.

MPI alone lets the job hang: the rank that raised waits in MPI_Finalize, the others in a collective.

What happens on one rank, and what the job then does:

- an exception, in the main thread or unhandled in another one: ends with code 1;
- KeyboardInterrupt: ends with code 130;
- SystemExit with a code other than 0: ends with that code under `guard`. In a script without it,
  and for SystemExit(0) or a plain return while others still work: the rank waits for the others
  when the process ends, and as soon as one waits for it in a collective the watchdog ends the job
  with code 75.

When all ranks raise at once, as they do for a wrong argument, rank 0 speaks first, and mostly
alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator
from types import TracebackType
from typing import NoReturn

from distopt.communicators.communicator import Communicator

__all__ = ["guard", "install"]

_RANK_0_FIRST_SECONDS = 0.6  # longer than Communicator.abort and the launcher take to end the others


@contextlib.contextmanager
def guard(communicator: Communicator) -> Generator[None]:
    """End the job when the block raises on this rank; with one rank, or threads, just raise.

    Args:
        communicator: of all ranks of the job.

    Example:
        with connect() as communicator, guard(communicator):
            train(communicator)
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if not _ends_job(communicator) or (isinstance(error, SystemExit) and not error.code):
            raise
        _end_job(communicator, error)


def install(communicator: Communicator) -> None:
    """Make an unhandled exception of this process end the job; `connect` does this for MPI.

    Replaces `sys.excepthook` and `threading.excepthook`; does nothing where a rank is not a
    process.
    """
    if not _ends_job(communicator):
        return
    process_id = os.getpid()  # a forked child must not end the job of its parent
    main_hook, thread_hook = sys.excepthook, threading.excepthook

    def end_after_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == process_id:
            _end_job(communicator, error)
        main_hook(kind, error, trace)

    def end_after_thread(arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        if os.getpid() == process_id and error is not None and not isinstance(error, SystemExit):
            name = arguments.thread.name if arguments.thread is not None else "unknown"
            _end_job(communicator, error, f" (in thread {name})")
        thread_hook(arguments)

    sys.excepthook = end_after_main
    threading.excepthook = end_after_thread


def _ends_job(communicator: Communicator) -> bool:
    return communicator.processes and communicator.size > 1


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int) and 0 < error.code < 256:
        return error.code
    return 1


def _end_job(communicator: Communicator, error: BaseException, where: str = "") -> NoReturn:
    if communicator.rank != 0:
        time.sleep(_RANK_0_FIRST_SECONDS)
    stream = sys.__stderr__
    if stream is not None and not isinstance(error, SystemExit):
        # In one piece, or the lines of several ranks are shuffled.
        stream.write("".join(traceback.format_exception(error)))
        stream.flush()
    summary = "".join(traceback.format_exception_only(error)).strip().splitlines()
    communicator.abort(_exit_code(error), (summary[0] if summary else repr(error)) + where)
