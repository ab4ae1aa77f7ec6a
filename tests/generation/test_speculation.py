"""Drafts equal the MTP depths of training; what is kept is what plain decoding would say."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax.generation import SamplingParams, forward
from dsv3_jax.generation.cache import init_cache
from dsv3_jax.generation.prefill import prefill
from dsv3_jax.generation.sampling import make_sampler
from dsv3_jax.generation.speculation import Drafts, verify
from dsv3_jax.model import Transformer
from tests.generation.models import CONFIGS, generator, teacher_forced, variables

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 29, n).tolist() for n in (7, 1, 16)]


def test_drafts_are_the_depths_of_training():
    """Also after a rejection: what wrong drafts left in the depths' caches does not show."""
    name, config, n = "v3", CONFIGS["v3"], 12
    text = np.random.default_rng(8).integers(0, 29, (1, n + 3)).astype(np.int32)
    weights = generator(name, speculate=2, page_size=4).weights
    cache = init_cache(config, 1, 32, "fp32", drafts=2)
    start = n - 3
    lengths = np.array([start], np.int32)
    cache, hidden = prefill(weights, cache, text[:, :start], lengths, config, chunk=4, drafts=2)
    draft = jax.jit(forward.draft, static_argnames=("depth", "config"))
    decode = jax.jit(forward.decode, static_argnames="config")

    def chain(cache, hidden, length, tokens):
        """Both depths over the last four positions; `tokens` is the text as far as it is known."""
        states, state = [], hidden
        for depth in (1, 2):
            later = tokens[:, length - 4 + depth : length + depth]
            state, cache = draft(weights, cache, depth, state, later, np.ones(1, bool), config)
            states.append(np.asarray(state[0, -1]))
        return states, cache

    wrong = text.copy()
    wrong[:, start + 1 :] = (wrong[:, start + 1 :] + 5) % 29
    _, cache = chain(cache, hidden, start, wrong)
    new, _, cache = decode(weights, cache, text[:, start:n], np.ones(1, bool), config)
    cache = dataclasses.replace(cache, lengths=cache.lengths + 3)
    found, _ = chain(cache, jnp.concatenate([hidden, new], 1)[:, -4:], n, text)

    run = jax.jit(lambda v, t: Transformer(config).apply(v, t[:, :-1], targets=t[:, 1:]))
    out = run(variables(name), jnp.asarray(text))
    for state, expected in zip(found, out.mtp_hidden, strict=True):
        np.testing.assert_allclose(state, expected[0, n - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "drafts"), [("v3", 2), ("mqa", 2)])
def test_greedy_text_is_that_of_plain_decoding(name, drafts):
    plain = generator(name).generate(prompts(), GREEDY)
    fast = generator(name, speculate=drafts, page_size=4)
    before = fast.statistics.steps
    found = fast.generate(prompts(), GREEDY)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    taken = fast.statistics.steps - before
    assert 0 < taken < 3 * (GREEDY.max_new_tokens - 1)  # Some draft was accepted: fewer steps than tokens.


def test_verification_keeps_the_distribution():
    """Whatever the drafts' distributions, the tokens kept are distributed as the model says."""
    n, vocab = 6000, 5
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(vocab), 3).astype(np.float32)
    q = rng.dirichlet(np.ones(vocab), 2).astype(np.float32)
    sampler = make_sampler([SamplingParams(seed=s) for s in range(n)], 0)
    drafted = np.stack([rng.choice(vocab, n, p=row / row.sum()) for row in q.astype(np.float64)], 1)
    drafts = Drafts(jnp.asarray(drafted, jnp.int32), jnp.broadcast_to(q, (n, 2, vocab)))
    tokens, accepted = jax.jit(verify)(drafts, jnp.broadcast_to(p, (n, 3, vocab)), sampler, jnp.full(n, 9))
    tokens, accepted = np.asarray(tokens), np.asarray(accepted)
    for j in range(3):
        reached = tokens[accepted >= j, j]  # Given that all drafts before were kept.
        counts = np.bincount(reached, minlength=vocab)
        probs = p[j].astype(np.float64)
        assert stats.chisquare(counts, len(reached) * probs / probs.sum()).pvalue > 1e-3
    # Acceptance is sum min(p, q) (arXiv 2211.17192, theorem 3.5); three deviations of a binomial.
    rate = np.minimum(p[0], q[0]).sum()
    assert abs((accepted >= 1).mean() - rate) < 3 * np.sqrt(rate * (1 - rate) / n)


def test_sampled_text_has_the_distribution_of_plain_decoding():
    """The first three tokens of many samples drafted by the depths, against the forward's probabilities."""
    n, prompt = 600, prompts()[0]
    requests = [SamplingParams(max_new_tokens=3, temperature=0.9, top_k=2, seed=s) for s in range(n)]
    texts = generator("v3", speculate=2, page_size=4).generate([prompt] * n, requests)
    found = collections.Counter(tuple(c.tokens) for c in texts)

    def following(text):
        """The two most probable tokens and their probabilities, in float64."""
        logits = teacher_forced("v3", text)[-1].astype(np.float64) / 0.9
        best = np.argsort(-logits)[:2]
        weights = np.exp(logits[best] - logits[best[0]])
        return zip(best.tolist(), weights / weights.sum(), strict=True)

    expected = {
        (a, b, c): pa * pb * pc
        for a, pa in following(prompt)
        for b, pb in following([*prompt, a])
        for c, pc in following([*prompt, a, b])
    }
    assert set(found) <= set(expected)
    counts = np.array([found[cell] for cell in expected])
    probs = np.array(list(expected.values()))
    often = n * probs >= 5  # Rarer ones together, as the test wants it.
    cells = [np.append(x[often], x[~often].sum()) for x in (counts, n * probs)]
    kept = cells[1] > 1
    assert kept.sum() >= 4
    statistic = np.sum((cells[0] - cells[1])[kept] ** 2 / cells[1][kept])
    assert stats.chi2.sf(statistic, kept.sum() - 1) > 1e-3
