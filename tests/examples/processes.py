"""Programs in processes of their own, which are ended whatever happens."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started(*command: str, compiled: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process, at its end killed. What this one has compiled is copied to ``compiled`` for it.

    It has a folder of its own because JAX writes its entries not atomically.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if compiled is not None:
        shutil.copytree(jax.config.jax_compilation_cache_dir, compiled)
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def outputs_of_two(
    command: Callable[[str, str], list[str]], compiled: Path | None = None
) -> list[str]:
    """What two processes print; ``command`` gets the address at which they meet, and the number."""
    for attempt in range(2):
        with socket.socket() as free:  # which another program may take before they do
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(
                    started(
                        *command(address, number),
                        compiled=compiled and compiled / f"{attempt}_{number}",
                    )
                )
                for number in "01"
            ]
            outputs = []
            for process in processes:
                outputs.append(process.communicate(timeout=300)[0])
                if process.returncode:  # for which the other would wait
                    processes[1].kill()
        if not any("Failed to add port" in output for output in outputs):
            break
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
