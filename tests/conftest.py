"""Strict by default: four devices, run-time shape types, no silent promotion, warnings are errors.

Programs compile sooner and run slower than a user's: most tests run each of theirs once or twice. A module
that runs a real model asks for the fixture `optimised`, a test for `optimised_here`; with DEFAULT_EMITTERS=1
in the environment XLA compiles loops as in a user's process. On JAX before 0.11 a program that an earlier
test had, of any worker, is read back from a folder that lives as long as the session.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

flags = ["--xla_force_host_platform_device_count=4", "--xla_cpu_parallel_codegen_split_count=1"]
has_older_emitters = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
if has_older_emitters and not os.environ.get("DEFAULT_EMITTERS"):
    # Of the compiler's time a third; and a library that plans a matrix product whenever it runs.
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_experimental_ynn_fusion_type="]
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("NPROC", "16")  # XLA's threads; see trainjax.parallel.mesh
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("trainjax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import helpers  # noqa: E402
from tests.seconds import pytest_terminal_summary  # noqa: E402, F401

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time that a recipe takes
gc.set_threshold(200_000, 20, 20)  # a traced program is many objects, none of them garbage

if has_older_emitters:
    from jax._src import compilation_cache as cache  # no public setting leaves programs out

    if "PROGRAMS_OF_TESTS" not in os.environ:  # the session that starts the workers, or one alone
        os.environ["PROGRAMS_OF_TESTS"] = tempfile.mkdtemp(prefix="trainjax-tests-")
        atexit.register(shutil.rmtree, os.environ["PROGRAMS_OF_TESTS"], ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", os.environ["PROGRAMS_OF_TESTS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    # A program of several CPU devices that is read back has its collectives in no order: devices that
    # begin with different ones wait for each other for good.
    read, write = cache.get_executable_and_time, cache.put_executable_and_time

    def read_if_alone(key, options, backend, devices):
        """What is in the folder, of programs of one device; nothing while another worker writes it."""
        try:
            return read(key, options, backend, devices) if len(devices) == 1 else (None, None)
        except Exception:  # half a file: whatever the reader makes of it
            return None, None

    def write_if_alone(key, name, executable, backend, seconds):
        """Puts programs of one device into the folder."""
        if len(executable.local_devices()) == 1:
            write(key, name, executable, backend, seconds)

    cache.get_executable_and_time = read_if_alone
    cache.put_executable_and_time = write_if_alone
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def optimised():
    """What a module compiles is optimised as a user's programs are."""
    with helpers.jax_settings({"jax_disable_most_optimizations": False}):
        yield


@pytest.fixture
def optimised_here():
    """What a test compiles is, and what the module compiles after it is not."""
    with helpers.jax_settings({"jax_disable_most_optimizations": False}):
        yield


def pytest_sessionfinish():
    """One round for what ends badly as garbage; pytest's own five would each go through every program."""
    gc.collect()
    gc.freeze()
