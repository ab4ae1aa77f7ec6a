"""The check before the first request: right kernels pass, a wrong one is named."""

import jax.numpy as jnp
import pytest

from dsv3_jax.generation import kernel_check
from dsv3_jax.generation.cache import DTYPES
from pallas_kernels import target_platform
from pallas_kernels.self_check import SelfCheckError
from tests.generation.models import CONFIGS


def test_right_kernels_pass_and_a_wrong_one_is_named(monkeypatch):
    kernel_check.compare.cache_clear()
    errors = kernel_check.compare(CONFIGS["v3"], "auto")
    assert set(errors) == {"mla_attention", "mla_decode", "gather_matvec", "grouped_matmul"}
    # bf16 results: rounding of 2^-9, averaged over many; zero would mean that nothing was compared.
    assert all(1e-5 < error < 1e-2 for name, error in errors.items() if name != "gather_matvec")
    assert errors["gather_matvec"] < 1e-5  # float32 results of exact products.

    right = kernel_check.grouped_matmul

    def wrong(*arrays, implementation):
        out = right(*arrays, implementation=implementation)
        return out if implementation == "reference" else out.at[8:].set(out[7])

    monkeypatch.setattr(kernel_check, "grouped_matmul", wrong)
    kernel_check.compare.cache_clear()
    with pytest.raises(SelfCheckError, match="grouped_matmul by"):
        kernel_check.compare(CONFIGS["v3"], "auto")
    kernel_check.compare.cache_clear()


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_codes_are_checked_as_codes(dtype, monkeypatch):
    seen, calls = [], kernel_check._calls
    right = kernel_check.mla_decode

    def decode(*arrays, **options):
        seen.append((arrays[0].dtype, arrays[1].dtype, options["c_kv_scale"].shape))
        return right(*arrays, **options)

    monkeypatch.setattr(kernel_check, "mla_decode", decode)
    monkeypatch.setattr(kernel_check, "_calls", lambda *a: {"mla_decode": calls(*a)["mla_decode"]})
    kernel_check.compare.cache_clear()
    errors = kernel_check.compare(CONFIGS["v3"], "auto", dtype)
    kernel_check.compare.cache_clear()
    codes, entries = DTYPES[dtype], (2, 200)
    assert seen == [(jnp.bfloat16, codes, entries), (jnp.float32, codes, entries)]
    assert 1e-5 < errors["mla_decode"] < 1e-2  # As above: what rounds is the query and the output.


def test_where_there_is_nothing_to_check(monkeypatch):
    assert kernel_check.check_kernels(CONFIGS["v3"], jnp.bfloat16, "bf16") == {}  # A CPU.
    with target_platform("gpu"):
        assert kernel_check.check_kernels(CONFIGS["v3"], jnp.float32, "fp32") == {}
        monkeypatch.setattr(kernel_check, "compare", lambda config, implementation, cache: {cache: 0.0})
        assert kernel_check.check_kernels(CONFIGS["v3"], jnp.bfloat16, "bf16") == {"bf16": 0.0}
        assert kernel_check.check_kernels(CONFIGS["v3"], jnp.bfloat16, "fp8") == {"fp8": 0.0}
        monkeypatch.setenv("PALLAS_SELF_CHECK", "0")
        assert kernel_check.check_kernels(CONFIGS["v3"], jnp.bfloat16, "bf16") == {}
