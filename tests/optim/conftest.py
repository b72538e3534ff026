import jax
import pytest


@pytest.fixture(autouse=True)
def promotion_that_optax_counts_on():
    """As in the training step: Optax raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
