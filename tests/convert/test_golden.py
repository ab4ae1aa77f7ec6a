"""Folders and logits that transformers wrote, for machines without torch.

    python -m tests.convert.test_golden    # writes them again, with the versions that `parity` installs

Logits are float32; the bound is that of `test_parity`.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.convert import compare
from dsv3_jax.pretrained import forward, load_pretrained
from tests.convert.generated import MSCALES, dense, latent, plain

FOLDER = Path(__file__).parent / "golden"
CONFIGS = {
    "v3": latent("sigmoid", 12, 4, True, 2.5, 1, (1, 1), MSCALES[3], True, False),
    "v2": latent("softmax", 0, 8, False, 16.0, 2, (1, 1), MSCALES[2], True, False),
    "llama": dense("gqa", 2, MSCALES[1], 2, True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    config, variables = load_pretrained(FOLDER / name)
    assert compare.same_model(config, CONFIGS[name])
    golden = np.load(FOLDER / name / "logits.npz")
    run = jax.jit(lambda v, t: forward(plain(config), v, t))
    found, expected = np.asarray(run(variables, golden["tokens"])), golden["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def write() -> None:
    import torch

    from tests.convert.test_parity import random_model

    for name, config in CONFIGS.items():
        model = random_model(dataclasses.replace(config), seed=7)
        model.save_pretrained(FOLDER / name)
        tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 9))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        np.savez(FOLDER / name / "logits.npz", tokens=tokens, logits=logits)
        for extra in ("generation_config.json",):
            (FOLDER / name / extra).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(write())
