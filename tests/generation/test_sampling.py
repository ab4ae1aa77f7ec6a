"""The sampler against numpy written from the definitions, and its draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax.generation.sampling import (
    RequestError,
    SamplingParams,
    distribution,
    draw,
    keys,
    log_probability,
    make_sampler,
    penalise,
)

REQUESTS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=3),
    SamplingParams(temperature=1.5, top_p=0.6),
    SamplingParams(min_p=0.3),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.8, min_p=0.2, repetition_penalty=1.4),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-6),
]


def expected_distribution(logits, request, seen):
    x = np.asarray(logits, np.float64).copy()
    for i in np.flatnonzero(seen):
        x[i] = x[i] / request.repetition_penalty if x[i] > 0 else x[i] * request.repetition_penalty
    if request.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    p = np.exp(x / request.temperature)
    p /= p.sum()
    kept = sorted(range(len(p)), key=lambda i: -p[i])
    if request.top_k:
        kept = kept[: request.top_k]
    total, nucleus = 0.0, []
    for i in kept:
        if total < request.top_p * p[kept].sum() or request.top_p == 1:
            nucleus.append(i)
        total += p[i]
    kept = [i for i in nucleus if p[i] >= request.min_p * p[nucleus].max()]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def test_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(REQUESTS), 20)).astype(np.float32) * 2
    seen = jnp.asarray(rng.random(logits.shape) < 0.3)
    sampler = make_sampler(REQUESTS, eos_id=3)
    found = jax.jit(
        lambda logits: distribution(penalise(logits, seen, sampler.repetition_penalty), sampler, filters=True)
    )(logits)
    for row, request in enumerate(REQUESTS):
        expected = expected_distribution(logits[row], request, seen[row])
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-6)  # Sums of 20 float32 values.
    plain = distribution(jnp.asarray(logits[:2]), make_sampler(REQUESTS[:2], 3), filters=False)
    for row in range(2):
        expected = expected_distribution(logits[row], REQUESTS[row], np.zeros(20, bool))
        np.testing.assert_allclose(plain[row], expected, rtol=0, atol=1e-6)


def test_draws_follow_the_distribution():
    n, probs = 4000, np.array([0.5, 0.0, 0.3, 0.15, 0.05], np.float32)
    sampler = make_sampler([SamplingParams(seed=s) for s in range(n)], 0)
    tokens = draw(jnp.broadcast_to(probs, (n, 5)), keys(sampler, jnp.full(n, 17), 0))
    counts = np.bincount(tokens, minlength=5)
    assert counts[1] == 0
    # One fixed set of seeds: a right sampler would be unlucky once in a thousand choices of it.
    assert stats.chisquare(counts[probs > 0], n * probs[probs > 0]).pvalue > 1e-3
    again = draw(jnp.broadcast_to(probs, (n, 5)), keys(sampler, jnp.full(n, 18), 0))
    assert (np.asarray(again) != tokens).any()  # Another position, another draw.


def test_log_probability_is_the_models():
    logits = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    tokens = np.array([1, 6, 0])
    wide = logits.astype(np.float64)
    expected = wide[np.arange(3), tokens] - np.log(np.exp(wide).sum(-1))
    found = log_probability(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop_tokens", tuple(range(9))),
        ("stop_strings", ("",)),
    ],
)
def test_bad_parameters_are_named(field, value):
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})
