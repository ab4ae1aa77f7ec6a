"""The training step through a pipeline beside the same step without one: gradients, losses, counts, state.

`grid.py` has every schedule on 2, 4 and 8 ranks.
"""

import re

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.manager import Checkpoints
from dsv3_jax.config import MeshConfig
from dsv3_jax.config_checks import check, check_machine
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state, shardings
from tests.pipeline.runs import config, errors

# Two MoE layers and a prediction depth; a dense and a MoE layer, each padded on the other one's rank; two
# depths. The balance loss is that of whole micro-batches, and documents are packed.
CASES = {
    "1f1b, 2 x 2 x 2, FSDP": dict(
        name="1f1b",
        mesh=MeshConfig(pipe=2, data=2, expert=2, sharding="fsdp"),
        mtp=1,
        # Whose sums do not depend on how many experts a device has: see `grid.py`.
        moe=dict(n_dense_layers=0, implementation="blocked"),
    ),
    "dualpipe, 2 x 2 x 1, ZeRO-1, remat": dict(
        name="dualpipe", mesh=MeshConfig(pipe=2, data=2, sharding="zero1"), mtp=1, remat="full"
    ),
    "dualpipe, 2 x 1 x 1": dict(
        name="dualpipe", mesh=MeshConfig(pipe=2, data=1), mtp=2, moe=dict(n_dense_layers=2)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_without_a_pipeline(case):
    fields = dict(CASES[case])
    moe = dict(batch_loss=0.1, n_shared=0) | fields.pop("moe", {})
    found = errors(config(micros=4, rows=16, layers=2, moe=moe, **fields))
    # Sums of float32 terms in another order: entries differ by 4e-7 of an array's largest one at most; in
    # float64 (`grid.py`) by 1e-15.
    assert found.loss <= 1e-6 and found.entry <= 1e-6 and found.norm <= 1e-6 and found.counts == 0, found


def test_experts_in_fp8():
    moe = dict(n_dense_layers=0, n_shared=0)
    c = config("1f1b", 2, MeshConfig(pipe=2, data=1), layers=2, rows=4, precision="fp8", moe=moe)
    found = errors(c)
    # The same bits where sums come in the same order. A value at the edge between two E4M3 numbers may fall
    # to either side, 2^-4 of itself away: of some hundred values 0.01 by norm. FP8 itself moves a gradient by
    # 0.06 and more, so a product that is not in FP8 shows.
    assert found.norm <= 0.01 and found.loss <= 1e-4 and found.counts == 0, found


def test_a_state_is_kept_without_regard_to_the_pipeline(tmp_path):
    """Saved on one mesh and read back on others, for any schedule: the same arrays, names and bytes."""
    halved = config("dualpipe", 4, MeshConfig(pipe=2, data=2, sharding="fsdp"))
    quartered = config("1f1b", 4, MeshConfig(pipe=4, data=1))
    plain, halves, quarters = (abstract_state(c, make_mesh(c.mesh)) for c in (config(), halved, quartered))
    assert halves.params["moe_layers"]["moe"]["gate_up"].sharding.shard_shape((2, 4, 12, 16)) == (2, 2, 6, 16)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), plain)
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), values, halves)
    checkpoints = Checkpoints(tmp_path, halved)
    checkpoints.save(1, {"train": placed}, {}, {})
    checkpoints.close()
    for c, where in ((config(), plain), (quartered, quarters)):
        checkpoints = Checkpoints(tmp_path, c)
        restored = checkpoints.restore_latest({"train": where})
        checkpoints.close()
        assert restored is not None and restored.step == 1
        state = restored.state["train"]
        jax.tree.map(np.testing.assert_array_equal, state, values)
        assert shardings(state) == shardings(where)


REFUSED = {
    "no schedule": (dict(pipe=2), "train.pipeline = '': mesh.pipe = 2 needs a schedule: one of gpipe"),
    "odd ranks": (
        dict(name="dualpipe", micros=6, pipe=3),
        "train.pipeline = 'dualpipe': .*ranks must be even.*Nearest: dualpipe on 4 ranks with 8 micro",
    ),
    "too few micro-batches": (
        dict(name="dualpipev", micros=2, pipe=2, layers=4),
        "two micro-batches a rank. Nearest: dualpipev on 2 ranks with 4",
    ),
    "fewer layers than stages": (
        dict(name="interleaved", micros=4, pipe=2),
        "mesh.pipe = 2: interleaved: too few layers: 3 layers in 4 stages.*Nearest: 3 stages, or 4 layers",
    ),
    "a ramp": (
        dict(name="1f1b", micros=2, pipe=2, ramp_start_batch=2, ramp_until=0.5),
        "train.ramp_start_batch = 2: a schedule has a fixed number of micro-batches",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_compiled(case):
    fields, message = REFUSED[case]
    fields = dict(fields)
    found = check_machine(config(mesh=MeshConfig(pipe=fields.pop("pipe"), data=1), **fields), 8, None)
    assert len(found) == 1 and re.search(message, str(found[0])), found


def test_an_unknown_schedule_is_refused():
    (problem,) = check(config("1f2b", 2))
    assert "train.pipeline = '1f2b': choose one of" in str(problem) and "1f1b" in problem.fix
