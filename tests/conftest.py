"""Settings under which every test runs: eight simulated devices, no warnings, seeded properties."""

import gc
import os
import tempfile

import hypothesis
import jax
import jaxlib.version
import pytest

# Must come before the first array: the number of devices is fixed when JAX starts.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Nearly all of the suite's time is compilation. LLVM's optimizations are off unless the environment
# decides; on the newest Python, CI runs the contracts and the references with them.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the processes that tests start
    jax.config.update("jax_disable_most_optimizations", True)

# Fewer, larger kernels in one module compile in half of the time. A newer jaxlib does not know the
# second of these flags, and an unknown one ends the process.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if jaxlib.version.__version_info__[:2] == (0, 10):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# And many tests compile the same programs. One folder per process: JAX does not write its entries
# atomically, so another process could read a half of one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled_for_tests_")
    jax.config.update("jax_compilation_cache_dir", COMPILED.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Tracing makes many objects and few cycles: with Python's usual thresholds, a sixth of the time is
# spent looking for these.
gc.set_threshold(100_000, 20, 50)

# Compilation makes the first example of a property slow, so a deadline would measure XLA.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Turns warnings into errors: a deprecation in a dependency is seen the day it appears."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture
def x64():
    """Float64 for the duration of a test, for comparisons to the last digits."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_promotion():
    """Refuses implicit dtype promotion, through which a half-precision update becomes float32.

    Not for tests that involve optax's moments, MultiSteps or schedules, which promote themselves.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees them after every module: each holds memory maps, of which Linux grants a process 65,530.

    A process that runs half of the suite would need more, and die of it. What a later module compiles
    again is read from the folder of compiled programs.
    """
    yield
    jax.clear_caches()
