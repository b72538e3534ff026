"""The thread that fills batches ahead: its errors, its end, and a quiet end of the program."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from tests import toy
from trainjax import data
from trainjax.data.stream import Prefetched


def examples():
    return data.encode(toy.rows(8), toy.tokenizer(), 64)


def test_closing_ends_the_thread_and_the_stream_may_go_on():
    before, stream = threading.active_count(), Prefetched(examples(), data.Plan(2, 64), slice(2))
    whole = [next(stream)["tokens"] for _ in range(6)]
    stream.close()
    assert threading.active_count() == before
    stream.set_state({"epoch": 0, "batch": 3})
    np.testing.assert_array_equal(next(stream)["tokens"], whole[3])
    stream.close()


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for():
    stream = Prefetched(examples(), data.Plan(2, 16), slice(2))
    with pytest.raises(ValueError, match="an example has .* tokens, a row 16"):
        next(stream)


def test_a_program_that_leaves_a_loader_open_ends_without_a_word():
    code = (
        "from tests import toy; from trainjax import data\n"
        "loader = data.supervised(toy.rows(8), toy.tokenizer(), batch_size=2, max_length=64)\n"
        "loader.itself = loader; next(loader)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Exception" not in done.stderr
