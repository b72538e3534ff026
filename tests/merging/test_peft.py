"""Live comparison with PEFT: task vectors in `merge_utils`, adapters in `add_weighted_adapter`."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import families
from tests.tensors import base_and_models
from trainjax import merging
from trainjax.merging import adapters, merge_tensor
from trainjax.merging.dare import kept

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: deprecations of one another
]
WEIGHTS = [1.0, 0.5, -0.7]


def in_torch(function, deltas, *args):
    import torch

    weights = torch.tensor(WEIGHTS)
    return function([torch.from_numpy(delta) for delta in deltas], weights, *args).numpy()


def ties(density):
    return merging.ties(WEIGHTS, density, consensus=merging.counted_mean)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "method", "args"),
    [
        ("task_arithmetic", merging.task_arithmetic(WEIGHTS), []),
        ("ties", ties(0.2), [0.2]),
        ("ties", ties(0.7), [0.7]),
        ("ties", ties(1.0), [1.0]),
    ],
)
def test_task_vectors_merge_as_in_peft(seed, name, method, args):
    from peft.utils import merge_utils

    base, models = base_and_models(seed)
    expected = in_torch(getattr(merge_utils, name), [model - base for model in models], *args)
    found = merge_tensor(method, base, models) - base
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dare_linear", merging.dare_linear(WEIGHTS, 0.4, seed=3)),
        ("dare_ties", merging.dare_ties(WEIGHTS, 0.4, seed=3, consensus=merging.counted_mean)),
    ],
)
def test_dare_with_equal_draws_is_that_of_peft(monkeypatch, name, method):
    import torch
    from peft.utils import merge_utils

    base, models = base_and_models(0)
    masks = iter(kept(3, "w", i, 0, base.size, 0.4).reshape(base.shape) for i in range(3))
    monkeypatch.setattr(
        torch, "bernoulli", lambda _: torch.from_numpy(next(masks).astype(np.float32))
    )
    expected = in_torch(getattr(merge_utils, name), [model - base for model in models], 0.4)
    found = merge_tensor(method, base, models, "w") - base
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


# --- adapters -----------------------------------------------------------------------------------

LORAS = {
    "one": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "two": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "three": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    },
}
OF_OTHER_RANKS = {"rank_pattern": {"up_proj": 2}}


@pytest.fixture(scope="module", params=["equal ranks", "other ranks"])
def theirs(request, tmp_path_factory):
    """PEFT's model with three adapters, and the folders where it has saved them."""
    import peft

    path = tmp_path_factory.mktemp("adapters")
    model = families.torch_model("llama_grouped")
    changes = OF_OTHER_RANKS if request.param == "other ranks" else {}
    for name, settings in LORAS.items():
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", **settings | (changes if name == "three" else {})
        )
        if name == "one":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    families.torch_randomised(model, only="lora_")
    model.save_pretrained(path)
    return model, [path / name for name in LORAS], request.param


def updates(folder):
    """What an adapter of scale 1 adds, by module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        module: tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        for module in modules
    }


@pytest.mark.parametrize(
    ("name", "combine", "options"),
    [
        ("cat", adapters.cat, {}),
        ("svd", adapters.svd(), {}),
        ("svd", adapters.svd(3), {"svd_rank": 3}),
        ("linear", adapters.linear, {}),
        (
            "ties_svd",
            adapters.dense_svd(lambda w: merging.ties(w, 0.5, consensus=merging.counted_mean), 3),
            {"svd_rank": 3, "density": 0.5},
        ),
    ],
    ids=["cat", "svd", "svd 3", "linear", "ties_svd"],
)
def test_adapters_merge_as_in_peft_and_load_there(theirs, tmp_path, name, combine, options):
    import peft

    model, folders, ranks = theirs
    if name == "linear" and ranks == "other ranks":
        pytest.skip("factors of other ranks cannot be added")
    new = f"{name} {options}".replace(".", "")
    model.add_weighted_adapter(list(LORAS), WEIGHTS, new, combination_type=name, **options)
    merging.merge_adapters(tmp_path / "ours", combine, folders, WEIGHTS)
    found = updates(tmp_path / "ours")
    for module, update in found.items():
        layer = model.get_submodule(module)
        expected = layer.get_delta_weight(new).detach().numpy()
        np.testing.assert_allclose(update, expected, rtol=0, atol=2e-5, err_msg=module)

    again = peft.PeftModel.from_pretrained(families.torch_model("llama_grouped"), tmp_path / "ours")
    loaded = {
        module: again.get_submodule(module).get_delta_weight("default").detach().numpy()
        for module in found
    }
    for module, update in found.items():
        np.testing.assert_allclose(loaded[module], update, rtol=0, atol=1e-5, err_msg=module)
    assert len(found) == sum("default" in getattr(m, "lora_A", {}) for m in again.modules())
