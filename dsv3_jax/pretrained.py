"""Released models in three calls: `load_pretrained`, `forward`, `save_pretrained`."""

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert import export, export_plan, load, opened
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.sources import MemorySource
from dsv3_jax.model import Transformer
from dsv3_jax.model import forward as apply

log = logging.getLogger(__name__)


def load_pretrained(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in a folder: of Hugging Face, of ours (`dsv3 import`), or a training run's checkpoint.

    Nothing is downloaded, no pickle is read, and no more than a few MiB are staged on the host for an array
    that is larger than 256 MiB on its device. Tensors in E4M3 are multiplied by their scales.

    Args:
      path: a folder.
      dtype: of the parameters, for example `jnp.bfloat16`; None keeps the stored ones. The router bias is
        float32 always.
      mesh: of `dsv3_jax.parallel.mesh.make_mesh`: every array is split over it as in training with FSDP.
        None puts everything on the first device.

    Returns:
      (config, variables): variables are `{"params": ..., "router": ...}`, which `forward`, the
      generation code and `model.apply` take.

    Raises:
      ConversionError: with every problem of a damaged, contradictory or unsupported folder.
    """
    with opened.open_source(path) as source:
        source.log_notes(log)
        return source.config, load.variables(source.dequantised(), dtype, mesh)


def forward(
    config: ModelConfig,
    variables: Any,
    tokens: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Logits of the next token at every position, float32.

    Activations have the dtype of the embedding; the product with the head accumulates in float32.

    Args:
      config: as returned by `load_pretrained`.
      variables: parameters and router state.
      tokens: token ids, int32.
      segment_ids: tokens attend within equal ids only, and to what precedes them; None: to the whole past.
    """
    dtype = variables["params"]["embedding"].dtype
    outputs = apply(Transformer(config, dtype), variables, jnp.asarray(tokens), None, segment_ids)
    return jnp.einsum(
        "bsd,dv->bsv", outputs.hidden, outputs.head.astype(dtype), preferred_element_type=jnp.float32
    )


def save_pretrained(
    path: str | Path, config: ModelConfig, variables: Any, *, dtype: Any = None, fp8: bool = False
) -> None:
    """Writes a Hugging Face folder: config.json and safetensors, in files of 5 GB.

    `transformers.AutoModelForCausalLM.from_pretrained` reads it where transformers has the class; the
    prediction layers are written as DeepSeek-V3 was released.

    Args:
      path: must not exist. `<path>.partial` grows beside it and is renamed when whole.
      config: of the model.
      variables: `{"params": ..., "router": ...}`; arrays may be sharded over the devices of this process.
      dtype: of the tensors, for example `jnp.bfloat16`; None keeps each parameter's. The router bias is
        float32 always.
      fp8: linear layers in E4M3 with one scale for 128x128, as DeepSeek-V3 was released; `dtype` is then
        that of the rest.

    Raises:
      ConversionError: a property that no Hugging Face class has, variables that are not the model's, a
        target that exists, a full disk.
    """
    try:
        source = MemorySource(config, variables)
    except ValueError as error:
        raise ConversionError("These variables are not those of the config", error.args[0]) from None
    kind = None if dtype is None else np.dtype(dtype)
    export.write(source, Path(path), export_plan.plan(source, dtype=kind, quantise=fp8))
