"""Calls in a process of their own."""

import multiprocessing
import os
import signal

import pytest

from benchmarks.apart import Aborted, Apart, answer


@pytest.fixture(scope="module")
def apart():
    with Apart() as apart:
        yield apart


def test_one_process_that_is_not_this_one(apart):
    first, second = apart(os.getpid), apart(os.getpid)
    assert first == second != os.getpid()


@pytest.mark.parametrize("crash", [signal.SIGABRT, signal.SIGILL, signal.SIGSEGV])
def test_what_crashes_ends_only_its_process(apart, crash):
    before = apart(os.getpid)
    with pytest.raises(Aborted):
        apart(signal.raise_signal, crash)
    assert apart(os.getpid) != before


def test_what_else_ends_it_is_told():
    """A machine without memory kills it: nothing is known of the call then."""
    with Apart() as apart, pytest.raises(SystemExit, match="exit code -9"):
        apart(signal.raise_signal, signal.SIGKILL)


def test_its_answer_to_a_program_that_was_killed_is_no_error():
    ours, theirs = multiprocessing.Pipe()
    ours.send((os.getpid, ()))
    ours.close()
    answer(theirs)


def test_its_process_ends_with_the_program():
    with Apart() as apart:
        process = apart.process
        assert process.is_alive()
    assert process.exitcode == 0
