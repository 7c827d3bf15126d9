"""Ctrl-C ends a run where nothing is half done.

Python raises ``KeyboardInterrupt`` wherever the program stands. Inside a save, orbax turns it into an
error that looks like a full disk; inside a callback of the garbage collector, it is lost. So the first
Ctrl-C is only noted, and raised between two steps.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

INTERRUPTED = 130  # what shells expect of a program that was stopped by Ctrl-C


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back within the block.

    Yields:
      The function to call between two steps: it raises ``KeyboardInterrupt`` if Ctrl-C was pressed. The
      second Ctrl-C raises it at once.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    # Python handles signals in the main thread only. A program that ignores Ctrl-C goes on doing so.
    holds = threading.current_thread() is threading.main_thread() and callable(before)
    if holds:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        if holds:
            signal.signal(signal.SIGINT, before)


def leave(go_on: str) -> NoReturn:
    """Ends a program that Ctrl-C has stopped, and says with which command it goes on."""
    print(f"\ninterrupted. To go on:\n{go_on}", file=sys.stderr)
    sys.exit(INTERRUPTED)
