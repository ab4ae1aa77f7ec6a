"""Checkpoints through saves, damage and other meshes."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax.checkpoint import CheckpointError, Checkpoints, integrity
from dsv3_jax.config import CheckpointConfig, Config, ModelConfig, OptimizerConfig
from tests.checkpoint.states import State, abstract, assert_same, kept, make_state

ROOT = Path(__file__).parents[2]
# Of processes started here, which do not inherit pytest's import path.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def fill(directory, steps, config=None, losses=None):
    """Saves `steps` in order, each finished before the next."""
    checkpoints = Checkpoints(directory, config or Config())
    for i, step in enumerate(steps):
        metrics = {} if losses is None else {"validation_loss": losses[i]}
        checkpoints.save(step, make_state(step), {"data": {"at": 10**13 + step}}, metrics)
    checkpoints.close()


def test_comes_back_bit_for_bit_though_the_caller_donates_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", Config())
    extras = {"data": {"epoch": 1, "at": 14_800_000_000_001}, "counters": {"bad_steps": 2}}
    state = make_state(5)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints.save(5, state, extras)
    overwritten = overwrite(state)
    extras["data"]["at"] = 0
    checkpoints.wait()
    restored = checkpoints.restore_latest(abstract(overwritten))
    checkpoints.close()
    assert restored.step == 5
    assert restored.extras == {"data": {"epoch": 1, "at": 14_800_000_000_001}, "counters": {"bad_steps": 2}}
    assert_same(restored.state, make_state(5))
    saved = json.loads((tmp_path / "c/5/config/metadata").read_text())
    assert saved["model"]["attention"]["kv_lora_rank"] == Config().model.attention.kv_lora_rank


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release, write = threading.Event(), integrity.write_digest
    monkeypatch.setattr(integrity, "write_digest", lambda path: (release.wait(30), write(path)))
    checkpoints = Checkpoints(tmp_path, Config())
    checkpoints.save(1, make_state(1), {})
    assert kept(tmp_path) == []  # Still being written, and yet we are here.
    release.set()
    checkpoints.close()
    assert kept(tmp_path) == [1]


def test_nothing_yet_is_none_and_imports_no_orbax(tmp_path):
    code = (
        "import sys; from dsv3_jax.checkpoint import Checkpoints; from dsv3_jax.config import Config\n"
        f"c = Checkpoints({str(tmp_path / 'none')!r}, Config())\n"
        "assert c.restore_latest({}) is None; c.close(); assert not any('orbax' in m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 0), (2, 1), (2, 2)])
def test_keeps_the_newest_and_the_best(tmp_path, keep_last, keep_best):
    losses = [3.0, 1.0, float("nan"), 2.0, 5.0, 4.0]
    config = Config(checkpoint=CheckpointConfig(keep_last=keep_last, keep_best=keep_best))
    fill(tmp_path, [1, 2, 3, 4], config, losses)
    fill(tmp_path, [5, 6], config, losses[4:])  # The ranking survives a restart.
    best = sorted(range(1, 7), key=lambda step: np.nan_to_num(losses[step - 1], nan=np.inf))[:keep_best]
    assert kept(tmp_path) == sorted(set(range(7 - keep_last, 7)) | set(best))
    assert all(path.name.isdigit() for path in tmp_path.iterdir())  # No trash, nothing temporary.


def test_a_step_that_has_a_checkpoint_is_not_saved_again(tmp_path):
    fill(tmp_path, [3])
    before = (tmp_path / "3" / integrity.DIGEST_FILE).stat().st_mtime_ns
    fill(tmp_path, [3])
    assert (tmp_path / "3" / integrity.DIGEST_FILE).stat().st_mtime_ns == before


def test_what_fails_in_the_background_is_raised_and_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Config())
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_digest", full)
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match="step 2 could not be written.*No space left on device"):
            checkpoints.wait()
    assert kept(tmp_path) == [1]
    assert Checkpoints(tmp_path, Config()).restore_latest(abstract(make_state(0))).step == 1


def largest(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    victim = largest(path)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    return victim


def truncate(path):
    victim = largest(path)
    os.truncate(victim, victim.stat().st_size - 1)
    return victim


def remove(path):
    (path / "extras/metadata").unlink()
    return path / "extras/metadata"


def add(path):
    (path / "state/left_over").write_text("")
    return path / "state/left_over"


def remove_digest(path):
    (path / integrity.DIGEST_FILE).unlink()
    return path / integrity.DIGEST_FILE


@pytest.mark.parametrize("damage", [flip, truncate, remove, add, remove_digest])
def test_a_damaged_checkpoint_is_named_moved_aside_and_passed_over(tmp_path, caplog, damage):
    fill(tmp_path, [1, 2])
    victim = damage(tmp_path / "2").relative_to(tmp_path / "2")
    files = {p.relative_to(tmp_path / "2") for p in (tmp_path / "2").rglob("*")}
    checkpoints = Checkpoints(tmp_path, Config())
    with caplog.at_level(logging.ERROR, "dsv3_jax"):
        restored = checkpoints.restore_latest(abstract(make_state(0)))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("dsv3_jax")]
    assert lines[0].startswith(f"checkpoint {tmp_path / '2'} is damaged: {victim}: ") and len(lines) == 2
    assert restored.step == 1 and restored.extras["data"]["at"] == 10**13 + 1
    assert_same(restored.state, make_state(1))
    aside = tmp_path / "2.damaged"
    assert {p.relative_to(aside) for p in aside.rglob("*")} == files  # Moved, not deleted.
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert Checkpoints(tmp_path, Config()).restore_latest(abstract(make_state(0))).step == 2
    assert aside.exists()


def test_when_none_is_sound_a_run_does_not_start_anew(tmp_path):
    fill(tmp_path, [1, 2])
    flip(tmp_path / "1")
    truncate(tmp_path / "2")
    for _ in range(2):  # Nor when the same command is tried again.
        with pytest.raises(CheckpointError, match="none of them is sound.*another --workdir"):
            Checkpoints(tmp_path, Config()).restore_latest(abstract(make_state(0)))
    assert {path.name for path in tmp_path.iterdir()} == {"1.damaged", "2.damaged"}


def test_an_older_damaged_one_does_not_stop_the_run(tmp_path, caplog):
    """Orbax reads the metrics of every checkpoint when a run first saves."""
    fill(tmp_path, [1, 2], losses=[2.0, 1.0])
    (tmp_path / "1/metrics/metrics").write_text("{")
    checkpoints = Checkpoints(tmp_path, Config())
    assert checkpoints.restore_latest(abstract(make_state(0))).step == 2
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.damaged", "2", "3"]
    assert "metrics/metrics" in caplog.text


def test_a_half_written_one_is_ignored_and_cleaned(tmp_path):
    fill(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "trash/0/state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, Config())
    assert checkpoints.restore_latest(abstract(make_state(0))).step == 1
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_state_of_another_config_is_refused_with_fields_values_and_fix(tmp_path):
    fill(tmp_path, [4])
    other = make_state(0)
    other.params["embed"]["embedding"] = jnp.zeros((300, 64))
    other.params["norm"]["scale"] = jnp.zeros((7,), jnp.float32)
    other.router["bias"] = jnp.zeros((2, 8))
    config = Config(model=ModelConfig(d_model=64), optimizer=OptimizerConfig(moment_dtype="bfloat16"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, config).restore_latest(abstract(other))
    assert str(caught.value).splitlines() == [
        f"The state in {tmp_path / '4'} is not that of this config:",
        "  model.d_model is 128 in the checkpoint and 64 here",
        "  optimizer.moment_dtype is 'float32' in the checkpoint and 'bfloat16' here",
        "  params/embed/embedding is float32[300, 100] in the checkpoint and float32[300, 64] here",
        "  params/norm/scale is bfloat16[7] in the checkpoint and float32[7] here",
        "  router/bias is absent in the checkpoint and float32[2, 8] here",
        "Set the fields back to what the checkpoint has, or use another --workdir to start anew.",
    ]
    assert kept(tmp_path) == [4]  # It is sound: it stays.


def test_host_memory_is_restored_to_host_memory(tmp_path):
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    state = {"params": make_state(1).params, "ema": jax.device_put(make_state(2).params, host)}
    checkpoints = Checkpoints(tmp_path, Config())
    checkpoints.save(1, state, {})
    restored = checkpoints.restore_latest(abstract(state)).state
    checkpoints.close()
    assert_same(restored, state)
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, restored)
    assert set(jax.tree.leaves(kinds["ema"])) == {"pinned_host"}
    assert set(jax.tree.leaves(kinds["params"])) == {"device"}


def on_mesh(state: State, shape: tuple[int, int]):
    """The state over the first devices as a mesh data x expert: embeddings split both ways."""
    mesh = Mesh(np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "expert"))
    split = NamedSharding(mesh, PartitionSpec("data", "expert"))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 2 else whole), state)


def run_meshes(directory: str) -> None:
    """In a process of its own."""
    assert len(jax.devices()) == 4
    with_four = on_mesh(make_state(1), (2, 2))
    checkpoints = Checkpoints(directory, Config())
    checkpoints.save(1, with_four, {})
    checkpoints.close()
    for shape in [(4, 1), (1, 2)]:  # Another mesh, and fewer devices.
        wanted = on_mesh(make_state(0), shape)
        restored = Checkpoints(directory, Config()).restore_latest(abstract(wanted)).state
        assert_same(restored, make_state(1))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)


def test_restores_under_another_mesh_and_on_fewer_devices(tmp_path):
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment)
    # And in this process, on one device.
    restored = Checkpoints(tmp_path, Config()).restore_latest(abstract(make_state(0)))
    assert_same(restored.state, make_state(1))


if __name__ == "__main__":
    run_meshes(sys.argv[1])
