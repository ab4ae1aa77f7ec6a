"""The first state of a run: from its seed, or from weights that exist (`train.init_from`)."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.checkpoint.manager import CheckpointError
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.convert import compare, load, mapping
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.opened import Opened, open_source
from dsv3_jax.generation.folders import tokenizer_of
from dsv3_jax.training import optimizer
from dsv3_jax.training.state import TrainState, abstract_state, init_state, shardings

log = logging.getLogger(__name__)

Problem = tuple[str, Any, str]  # Field, value, fix.


def problems(config: Config, workdir: str | Path) -> list[Problem]:
    """Why the weights of `train.init_from` do not fit the run, as (field, value, fix); reads no weights.

    A run that has checkpoints does not look at the folder again, which may be gone by then.
    """
    folder = config.train.init_from
    if not folder or has_checkpoints(workdir):
        return []
    try:
        with open_source(folder, quick=True) as source:
            return [*_of_model(config, source), *_of_tokenizer(config, Path(folder))]
    except ConversionError as error:
        return [("train.init_from", folder, f"give a folder that can be read. {error}")]


def has_checkpoints(workdir: str | Path) -> bool:
    """Whether a run would be resumed, and not begun."""
    return any(path.name.isdigit() for path in (Path(workdir) / "checkpoints").glob("*"))


def _of_model(config: Config, source: Opened) -> list[Problem]:
    model, folder, found = config.model, config.train.init_from, []
    for name, theirs, ours in compare.differences(_with_depth(source.config, model), model):
        fix = f"the weights have {theirs!r}; set --config.model.{name}={theirs}"
        if name == "mtp.depth":
            fix = f"the weights have {theirs} prediction layers; set --config.model.mtp.depth={theirs}"
        found.append((f"model.{name}", ours, fix))
    if found:
        fix = f"other weights, or the configuration that `dsv3 inspect {folder} --write-config FILE` writes"
        found.append(("train.init_from", folder, fix))
    sparse = model.moe.n_dense_layers < model.n_layers
    if source.kind == "huggingface" and sparse and not mapping.has_bias(model) and model.moe.bias_speed:
        fix = "models of this class are exported without a router bias; set --config.model.moe.bias_speed=0"
        found.append(("model.moe.bias_speed", model.moe.bias_speed, fix))
    return found


def _with_depth(weights: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model of the weights, with no more prediction layers than the run trains."""
    depth = min(weights.mtp.depth, model.mtp.depth)
    return dataclasses.replace(weights, mtp=dataclasses.replace(weights.mtp, depth=depth))


def _of_tokenizer(config: Config, folder: Path) -> list[Problem]:
    """The weights know the tokens of one tokenizer. Tokens that were added to it may differ."""
    theirs, ours = tokenizer_of(folder), config.data.tokenizer
    if not theirs or theirs == ours:
        return []
    known, given = _vocabulary(theirs), _vocabulary(ours)
    if known is None or given is None:  # A file that is not there: that is the data's own check.
        return []
    differing = sum(given.get(token) != number for token, number in known.items())
    if not differing:
        return []
    fix = f"{differing} of {len(known)} tokens of the weights have another id; use {theirs}"
    return [("data.tokenizer", ours, fix)]


def _vocabulary(spec: str) -> dict[str, int] | None:
    """{token: id}, without added tokens; None if it cannot be read."""
    if spec == "byte":
        return {f"<0x{byte:02X}>": byte for byte in range(256)}
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(Path(spec).expanduser())).get_vocab(with_added_tokens=False)
    except Exception:  # The library raises bare Exception.
        return None


def first_state(config: Config, mesh: Mesh) -> TrainState:
    """Step 0: the weights of `train.init_from`, in float32, with fresh optimizer state; or `init_state`.

    A tensor at a time is read to where it will live, by each process what its devices hold. Prediction
    layers that the run does not train are left out.

    Raises:
      CheckpointError: the folder cannot be read any more.
    """
    folder = config.train.init_from
    if not folder:
        return init_state(config, mesh)
    abstract = abstract_state(config, mesh)
    layout = shardings(abstract)
    flat, _ = jax.tree_util.tree_flatten_with_path({"params": layout.params, "router": layout.router})
    places = {tuple(part.key for part in path): sharding for path, sharding in flat}
    try:
        with open_source(folder) as source:
            if jax.process_index() == 0:
                source.log_notes(log)
                left = source.config.mtp.depth - config.model.mtp.depth
                if left:
                    log.warning("%s: %d prediction layers are left out: model.mtp.depth", folder, left)
            arrays = load.arrays(source.dequantised(), places, np.float32)
    except ConversionError as error:
        raise CheckpointError(f"The weights of train.init_from could not be read. {error}") from error
    tree = {"params": {}, "router": {}} | mapping.nested(arrays.items())
    make = jax.jit(lambda params: optimizer.init(params, config.optimizer), out_shardings=layout.optimizer)
    return TrainState(tree["params"], tree["router"], make(tree["params"]))
