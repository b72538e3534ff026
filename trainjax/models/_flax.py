"""A Flax module of the user's own as params that adapters take and a pure function of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import PRNGKeyArray

from trainjax.models._layouts import Layouts, as_kernels
from trainjax.types import Params, pytree, static


class Program(Protocol):
    """What knows which kind of Flax module it is."""

    layouts: Layouts

    def run(
        self,
        params: Params,
        state: Params,
        key: PRNGKeyArray | None,
        inputs: tuple[Any, ...],
        settings: Mapping[str, Any],
    ) -> tuple[Any, Params]:
        """The outputs and the state after them; kernels have the module's own shapes or are `Weight`s."""
        ...

    def to_flax(self, params: Params, state: Params) -> Any:
        """Params of the module's own shapes and a state as Flax has them."""
        ...


@pytree
class FlaxModel:
    """What `from_linen` and `from_nnx` return: a module that any adapter goes on, and any loss sees.

    Every kernel of a dense layer, a convolution or an einsum is a matrix here, `[in, out]`, whatever its
    shape in the module, and all methods see matrices. An adapter that is attached is computed in its
    own form: of LoRA on a convolution, a convolution to `rank` channels and a product, as in PEFT; W + AB
    is never made.

    A pytree around the arrays, so a loss that has it among its inputs takes them as inputs of the step,
    and another state or other params do not retrace.

    Attributes:
        params: the arrays that train or that adapters go on, as a nested dict.
        state: the module's other arrays: batch statistics, and in NNX keys and counters.
    """

    params: Params
    state: Params
    program: Any = static()

    def __hash__(self) -> int:
        raise TypeError(
            "a FlaxModel is a pytree of arrays: give it to a jitted function as an argument, "
            "`jax.jit(lambda model, params, x: model.apply(params, x))(model, params, x)`"
        )

    def apply(
        self, params: Params, /, *inputs: Any, key: PRNGKeyArray | None = None, **settings: Any
    ) -> Any:
        """The module's outputs. What it does to its state is forgotten; see `updated`.

        Args:
            params: like `self.params`: these, merged ones, or `method.attach(model.params, adapter)`.
            *inputs: of the module's `__call__`.
            key: of what is random, such as dropout. In NNX the module's own keys without it.
            **settings: keywords of `__call__`: `train=True`.

        Raises:
            ValueError: an adapter in a place where none can be, by name and with the reason.
        """
        return self._run(params, key, inputs, settings)[0]

    def updated(
        self, params: Params, /, *inputs: Any, key: PRNGKeyArray | None = None, **settings: Any
    ) -> tuple[Any, FlaxModel]:
        """The module's outputs, and the model with the state that it has afterwards.

        For statistics of batches, which are not what a loss returns: `loss` goes on with the model as
        it was, until the loop hands it the new one.
        """
        outputs, state = self._run(params, key, inputs, settings)
        return outputs, FlaxModel(self.params, state, self.program)

    def with_params(self, params: Params) -> FlaxModel:
        """The same model with other weights: merged ones, say."""
        return FlaxModel(params, self.state, self.program)

    def to_flax(self, params: Params | None = None) -> Any:
        """Back to Flax: the variables of a Linen module, or an NNX module with these weights.

        Args:
            params: arrays like `self.params`, which are taken by default; an adapter is merged before.
        """
        own = as_kernels(self.params if params is None else params, self.program.layouts)
        return self.program.to_flax(own, self.state)

    def _run(
        self, params: Params, key: PRNGKeyArray | None, inputs: Any, settings: Any
    ) -> tuple[Any, Params]:
        own = as_kernels(params, self.program.layouts)
        return self.program.run(own, self.state, key, inputs, settings)
