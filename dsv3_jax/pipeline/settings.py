"""What of a configured pipeline cannot be, found before anything is compiled."""

from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.mesh_checks import mesh_shape
from dsv3_jax.pipeline.cells import ScheduleError
from dsv3_jax.pipeline.schedules import NAMES, n_stages, refuse, stage_sizes

Problem = tuple[str, Any, str]  # Field, value, fix: see `config_reading.Problem`.


def problems(config: Config, n_devices: int) -> list[Problem]:
    """(field, value, why not and the nearest that can be) of each, on a mesh that fits `n_devices`."""
    train, ranks = config.train, mesh_shape(config.mesh, n_devices).pipe
    if not train.pipeline:
        fix = f"mesh.pipe = {ranks} needs a schedule: one of {', '.join(NAMES)}; or set mesh.pipe=1"
        return [("train.pipeline", "", fix)] if ranks > 1 else []
    found: list[Problem] = []
    if train.ramp_start_batch:
        fix = "a schedule has a fixed number of micro-batches; 0, or train.pipeline='' with mesh.pipe=1"
        found.append(("train.ramp_start_batch", train.ramp_start_batch, fix))
    n_micro = train.batch_size // (train.micro_batch_size or train.batch_size)
    sizes = f"ranks are mesh.pipe = {ranks}, micro-batches train.batch_size / micro_batch_size = {n_micro}"
    try:
        refuse(train.pipeline, ranks, n_micro, chunks=train.pipeline_chunks)
    except ScheduleError as error:
        return [*found, ("train.pipeline", train.pipeline, f"{error} ({sizes})")]
    try:
        stage_sizes(config.model.n_layers, n_stages(train.pipeline, ranks, train.pipeline_chunks))
    except ScheduleError as error:
        found.append(("mesh.pipe", config.mesh.pipe, f"{train.pipeline}: {error}"))
    return found
