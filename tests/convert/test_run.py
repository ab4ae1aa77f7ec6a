"""A training run's checkpoint as a source: exported, imported and loaded without its training state."""

import dataclasses

import jax
import numpy as np

from dsv3_jax.checkpoint.manager import Checkpoints
from dsv3_jax.cli import main
from dsv3_jax.config import Config, TrainConfig
from dsv3_jax.pretrained import load_pretrained
from dsv3_jax.training.state import TrainState
from tests.convert import generated
from tests.convert.folders import CONFIG
from tests.convert.test_folders import same_arrays


def test_export_and_import_of_a_run(tmp_path):
    config = Config(model=CONFIG, train=dataclasses.replace(TrainConfig(), seq_len=32))
    saved = {}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config)
    for step in (3, 10):  # The last of them is taken.
        variables = generated.random_variables(CONFIG, seed=step)
        saved[step] = jax.tree.map(jax.numpy.asarray, variables)
        state = TrainState(saved[step]["params"], saved[step]["router"], {"moments": np.zeros(3)})
        checkpoints.save(step, {"train": state}, {"position": step})
    checkpoints.close()
    run = tmp_path / "run"
    assert main(["inspect", str(run)]) == 0
    for source, step in ((run, 10), (run / "checkpoints" / "3", 3)):
        found, loaded = load_pretrained(source)
        assert found == CONFIG
        same_arrays(loaded, saved[step])
    assert main(["export", "--from", str(run), "--to", str(tmp_path / "hf")]) == 0
    same_arrays(load_pretrained(tmp_path / "hf")[1], saved[10])
    assert main(["import", "--from", str(run), "--to", str(tmp_path / "ours")]) == 0
    same_arrays(load_pretrained(tmp_path / "ours")[1], saved[10])
    assert main(["export", "--from", str(run), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    halved = load_pretrained(tmp_path / "half")[1]
    assert halved["params"]["head"].dtype == jax.numpy.bfloat16
    digest = next((run / "checkpoints" / "10").rglob("d/*"))
    digest.write_bytes(digest.read_bytes()[:-1])
    assert main(["export", "--from", str(run), "--to", str(tmp_path / "no")]) == 1
