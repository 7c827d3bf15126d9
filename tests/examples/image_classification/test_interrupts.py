"""Ctrl-C ends a run where nothing is half done."""

import signal
import threading

import pytest

from examples.image_classification.interrupts import between_steps


@pytest.fixture(autouse=True)
def python_handles_interrupts():
    """Pytest may have been started in the background, where shells ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_waits_for_a_step(capfd):
    with between_steps() as check_interrupt:
        check_interrupt()
        signal.raise_signal(signal.SIGINT)
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()


def test_the_second_does_not():
    with between_steps():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_python_handles_it_again():
    with pytest.raises(RuntimeError), between_steps():
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_program_that_ignores_it_goes_on_doing_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with between_steps() as check_interrupt:
        signal.raise_signal(signal.SIGINT)
        check_interrupt()


def test_other_threads_have_no_signals():
    seen = []

    def run():
        with between_steps() as check_interrupt:
            check_interrupt()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
