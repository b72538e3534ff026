"""Strict by default: four devices, run-time shape types, no silent promotion, warnings are errors.

Programs compile sooner and run slower than a user's: most tests run each of theirs once or twice. A module
that runs a real model asks for the fixture `optimised`, a test for `optimised_here`; with DEFAULT_EMITTERS=1
in the environment XLA compiles loops as in a user's process. A program that an earlier test of the process
had is not compiled again.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from typing import Any

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
from jax._src import compilation_cache  # noqa: E402  # no public setting keeps programs in memory

from tests import helpers  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time that a recipe takes
gc.set_threshold(200_000, 20, 20)  # a traced program is many objects, none of them garbage

# Programs of earlier tests. JAX's own cache puts them into files, and a program of several CPU devices that
# is read back has its collectives in no order: devices that begin with different ones wait for good.
kept: dict[Any, tuple[Any, int]] = {}


def take(key, options, backend, devices, host_callbacks=()):
    """A program that was kept for these devices; none that calls functions of a test that is over."""
    if host_callbacks or (found := kept.pop((key, tuple(devices)), None)) is None:
        return None, None
    kept[key, tuple(devices)] = found  # as the newest
    return found


def keep(key, name, executable, backend, seconds):
    """Keeps a program, as one of a thousand."""
    kept[key, tuple(executable.local_devices())] = executable, seconds
    if len(kept) > 1000:
        del kept[next(iter(kept))]


compilation_cache.get_executable_and_time = take
compilation_cache.put_executable_and_time = keep
folder = tempfile.mkdtemp(prefix="trainjax-tests-")  # JAX asks for one; it stays empty
atexit.register(shutil.rmtree, folder, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
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
