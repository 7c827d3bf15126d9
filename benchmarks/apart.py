"""Calls in a process of their own, which a crash ends and not the program."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

# How a program ends itself, or is ended for its own mistake; who kills it from outside takes another.
CRASHES = (signal.SIGABRT, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE)


class Aborted(Exception):
    """What was called ended its process."""


class Apart:
    """One process, begun anew after what ended it.

    Functions, arguments and results are pickled: functions are those of a module.
    """

    def __enter__(self) -> Self:
        self.begin()
        return self

    def begin(self) -> None:
        """A process that waits for calls."""
        # Not a copy of this process: JAX has threads.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result.

        Raises:
          Aborted: where it ended its process.
          SystemExit: where something from outside did, such as a machine without memory.
        """
        self.connection.send((function, arguments))
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
        code = self.process.exitcode
        if code not in {-crash for crash in CRASHES}:
            raise SystemExit(f"The process of its own was ended from outside, exit code {code}.")
        self.begin()
        raise Aborted

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.connection.close()  # it returns; an error may have left it in the midst of a call
        if error is not None:
            self.process.terminate()
        self.process.join()


def answer(connection: Connection) -> None:
    """Calls what it is sent, until the program ends, be it killed."""
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            function, arguments = connection.recv()
            connection.send(function(*arguments))
