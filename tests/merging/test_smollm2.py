"""The real model: from GGUF and folders, and in how much memory."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import helpers
from trainjax import merging, models

pytestmark = pytest.mark.real

# Not `ru_maxrss`, which begins with what the parent has.
PEAK = """
import pathlib, re, sys
from trainjax import cli
assert cli.main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model as a folder in float32, and another whose weights are twice as large."""
    path = tmp_path_factory.mktemp("smollm2")
    model = models.load(helpers.smollm2_gguf())
    models.save_model(path / "one", model)
    models.save_model(path / "two", model, jax.tree.map(lambda w: w + w, model.params))
    return path / "one", path / "two"


@pytest.mark.slow
def test_a_gguf_file_and_a_folder_are_merged(folders, tmp_path):
    one, two = folders
    method = merging.linear([1.0, 1.0])
    merging.merge_models(tmp_path / "out", method, [helpers.smollm2_gguf(), two])
    expected = load_file(one / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, 1.5 * expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_merge_of_two_models_takes_less_than_400_mb(folders, tmp_path):
    """The two and the base take 540 MB each."""
    one, two = map(str, folders)
    flags = ["--method", "ties", "--density", "0.5", "--model", one, "--models", one, two]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "merge", *flags, "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.splitlines()[-1]) * 1024 < 400e6
