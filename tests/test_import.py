"""What importing costs: which packages come along, in a fresh interpreter."""

import os
import subprocess
import sys

import pytest

import trainjax

FOREIGN = {"torch", "tensorflow", "peft", "trl", "wandb", "datasets"}
_WITHOUT_FAKE_DEVICES = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
HEAVY = {"jax", "flax", "optax", "orbax", "numpy", "transformers", "tyro"}


def imported(statement: str) -> set[str]:
    """The top-level packages there are after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_alone_brings_nothing():
    assert imported("import trainjax") & (FOREIGN | HEAVY) == set()


def test_the_command_line_brings_nothing_before_a_job_is_chosen():
    found = imported("from trainjax import cli\ncli.main(['--help'])")
    assert found & (FOREIGN | HEAVY) == set()


LIBRARY = """
def there():
    import sys
    return print(*{name.partition('.')[0] for name in sys.modules})

from trainjax import data, losses, models, peft, policies, rollout, train
there()
from trainjax import *
import trainjax.recipes.sft, trainjax.recipes.inspect, trainjax.recipes.generate
there()
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""


def test_the_library_and_its_jobs_bring_no_other_framework_and_start_no_devices():
    """What reads data and gguf files comes when it is used.

    `jax.distributed.initialize` must come before devices, and so must a choice of them.
    """
    program = [sys.executable, "-c", LIBRARY]
    done = subprocess.run(program, env=_WITHOUT_FAKE_DEVICES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library, jobs = (set(line.split()) for line in done.stdout.splitlines())
    readers = {"gguf", "tensorflow_datasets", "tyro", "matplotlib", "pyarrow"}
    assert "jax" in library
    assert library & (FOREIGN | readers) == set()
    assert jobs & FOREIGN == set()


def test_every_public_name_is_there():
    assert dir(trainjax) == trainjax.__all__
    for name in trainjax.__all__:
        assert getattr(trainjax, name) is not None
    with pytest.raises(AttributeError, match="module 'trainjax' has no attribute 'lod'"):
        trainjax.lod  # noqa: B018
