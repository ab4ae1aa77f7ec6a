"""The check at start-up passes where the kernels are right, and says what is wrong where they are not."""

import jax
import pytest

from pallas_kernels.mla_attention import strips
from pallas_kernels.mla_decode import blocked
from pallas_kernels.self_check import SelfCheckError, self_check

SMALL = {"heads": 2, "d_nope": 16, "d_rope": 8, "d_v": 16, "rank": 32}


def test_right_kernels_pass():
    errors = self_check(**SMALL, cache="int8")
    assert len(errors) == 8
    assert 0 < max(errors.values()) < 1e-2


def test_a_wrong_decoder_is_named(monkeypatch):
    right = blocked.attention
    monkeypatch.setattr(blocked, "attention", lambda *a, scale: right(*a, scale=1.1 * scale))
    with pytest.raises(SelfCheckError, match="mla_decode output by .*'blocked' for decoding"):
        self_check(**SMALL)


def test_not_a_number_is_wrong(monkeypatch):
    right = strips.attention

    def attention(*operands, **options):
        out, lse = right(*operands, **options)
        return out * float("nan"), lse

    monkeypatch.setattr(strips, "attention", attention)
    with pytest.raises(SelfCheckError, match="mla_attention output by nan"):
        self_check(**SMALL)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PALLAS_SELF_CHECK", "0")
    monkeypatch.setattr(blocked, "attention", None)
    assert self_check(**SMALL) == {}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("heads, cache", [(16, "bfloat16"), (128, "bfloat16"), (16, "float8_e4m3fn")])
def test_the_kernels_for_deepseek_v3_pass(heads, cache):
    self_check(heads=heads, cache=cache)
