"""A training run starts only on attention kernels that compute what they should."""

import dataclasses

import jax
import pytest

import train
from dsv3_jax.config import Config
from pallas_kernels import self_check


@pytest.fixture
def asked(monkeypatch):
    """The widths that the check is asked for, on a machine that claims to have a GPU."""
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(self_check, "self_check", lambda **widths: calls.append(widths))
    return calls


def with_training(**changes):
    return dataclasses.replace(Config(), train=dataclasses.replace(Config().train, **changes))


def test_kernels_are_checked_at_the_widths_of_the_model(asked):
    train.check_kernels(Config())
    a = Config().model.attention
    widths = dict(d_nope=a.qk_nope_head_dim, d_rope=a.qk_rope_head_dim, d_v=a.v_head_dim)
    assert asked == [dict(heads=a.n_heads, rank=a.kv_lora_rank, **widths)]


def test_what_plain_jax_runs_is_not_checked(asked, monkeypatch):
    train.check_kernels(with_training(precision="fp32"))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    train.check_kernels(Config())
    assert asked == []


def test_a_wrong_kernel_ends_the_run(asked, monkeypatch, capsys):
    def wrong(**widths):
        raise self_check.SelfCheckError("differs from the reference: dq by 3e-1")

    monkeypatch.setattr(self_check, "self_check", wrong)
    with pytest.raises(SystemExit) as stopped:
        train.check_kernels(Config())
    assert stopped.value.code == 3 and "dq by 3e-1" in capsys.readouterr().err
