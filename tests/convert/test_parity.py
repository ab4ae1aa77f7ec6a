"""Logits and gradients against Hugging Face transformers, from folders that transformers wrote.

Float32 on both sides: products of a few dozen terms, three layers deep, differ by some 1e-6 relative. The
bounds are those promised: 2e-5 for logits and 1e-4 for gradients, relative to the largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.convert import compare
from dsv3_jax.pretrained import forward, load_pretrained
from tests.convert.generated import CONFIGS, plain
from tests.model.translate import to_oracle
from tests.oracles.from_transformers import model_like, model_params
from tests.oracles.tree import Tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # No shared experts.


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


def random_model(config, seed=0):
    """A transformers model with weights that matter: norms and router biases away from 1 and 0."""
    model, rng = model_like(config), np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.ndim > 1:
                p.copy_(torch.from_numpy(rng.normal(size=p.shape) * max(1, p.shape[-1]) ** -0.5))
            elif "norm" in name:
                p.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, p.shape)))
            elif "correction_bias" in name:
                p.copy_(torch.from_numpy(rng.uniform(-0.3, 0.3, p.shape)))
    return model


def flat(tree: Tree, name=""):
    """{path: array} without the empty ones."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: np.asarray(tree)} if np.size(tree) else {}


def test_the_configurations_cover_what_is_claimed():
    assert len(CONFIGS) >= 60
    latent = [c for c in CONFIGS.values() if c.attention.kind == "mla"]
    for gate in ("sigmoid", "softmax"):
        of_gate = [c for c in latent if c.moe.gate == gate]
        assert {c.moe.n_groups for c in of_gate} == {1, 2, 4, 8}
        assert {bool(c.attention.q_lora_rank) for c in of_gate} == {True, False}
        assert {c.rope.yarn_mscale_all_dim for c in of_gate if c.rope.yarn_factor > 1} == {1.0, 0.707, 0.8}
        assert {c.tie_embeddings for c in of_gate} == {True, False}
    v3 = [c for c in latent if c.moe.gate == "sigmoid"]
    assert {c.moe.n_shared for c in v3} == {0, 1, 2}
    assert {c.moe.n_dense_layers for c in v3} == {0, 1, 2, 3}
    assert {c.moe.normalize_gates for c in v3} == {c.rope.interleaved for c in v3} == {True, False}
    assert {c.moe.routed_scale for c in v3} == {1.0, 2.5, 16.0}
    assert {c.attention.kind for c in CONFIGS.values()} == {"mla", "mha", "gqa", "mqa"}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name, tmp_path):
    config = CONFIGS[name]
    reference = random_model(config)
    reference.save_pretrained(tmp_path)
    loaded, variables = load_pretrained(tmp_path)
    assert compare.same_model(loaded, config)

    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9))
    expected = reference(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    expected.loss.backward()

    def loss(params):
        logits = forward(plain(loaded), {"params": params, "router": variables["router"]}, ids)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
        return -chosen.mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(variables["params"])
    size = expected.logits.abs().max().item()
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), rtol=0, atol=2e-5 * size)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=2e-5)
    theirs = {n: p.grad.numpy() for n, p in reference.named_parameters() if p.grad is not None}
    for parameter in reference.named_parameters():  # An expert that no token reached has no gradient there.
        theirs.setdefault(parameter[0], np.zeros(tuple(parameter[1].shape), np.float32))
    wanted, found = flat(model_params(theirs, config)), flat(to_oracle(gradients, None, config))
    assert wanted.keys() == found.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    for path, gradient in wanted.items():
        # An expert that saw one token of little weight has a tiny gradient: rounding is relative to all.
        scale = max(np.abs(gradient).max(), 1e-3 * largest)
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-4 * scale, err_msg=path)
