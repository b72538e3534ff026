"""Programs that compile sooner and run slower, for tests of values that run each program once or twice."""

import jax
import pytest

LITTLE_OPTIMISED = {"jax_disable_most_optimizations": True}


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """A conftest.py that imports this has its folder's tests compile so."""
    yield from with_settings(LITTLE_OPTIMISED)


def with_settings(settings):
    """JAX's settings for the time of a fixture; what was compiled under them goes with them."""
    before = {name: jax.config.values[name] for name in settings}
    _update(settings)
    yield
    _update(before)
    jax.clear_caches()


def _update(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
