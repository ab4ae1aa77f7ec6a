"""Trains a model: `python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.train.steps=N]`.

The same command continues a run that was interrupted; SIGTERM and Ctrl-C finish the step under way and save.
On several hosts every process runs the same command (docs/clusters.md).
Exit codes: 0 done, or stopped by SIGTERM (a job of several processes: 143); 130 stopped by Ctrl-C; 2 a
configuration or data that cannot run; 3 a run that diverged, or that cannot be resumed or saved; 4 another
process of the job was lost.
"""

import argparse
import dataclasses
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dsv3_jax.config import Config

# ---------------------------------------------------------------- the command line and the configuration


def parse(argv) -> tuple["Config", Path]:
    """(Config, workdir), from the command line; prints every problem and exits with 2 if there is one."""
    from dsv3_jax.config_checks import typed
    from dsv3_jax.config_reading import ConfigError, Problem, override
    from dsv3_jax.parallel.distributed import StartError
    from dsv3_jax.parallel.launchers import FLAGS, find_place

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default="configs/tiny.py", help="a file with get_config()")
    parser.add_argument("--workdir", default="runs/default", help="where checkpoints and results go")
    for flag, meaning in FLAGS.items():
        parser.add_argument(flag, dest=flag, help=f"of a job of several processes: {meaning}")
    arguments, rest = parser.parse_known_args(_joined(argv))
    problems = [Problem(item, "", "expected --config.FIELD=VALUE") for item in rest if not _is_override(item)]
    try:
        tree = load_config_file(arguments.config)
        problems += override(tree, (item.removeprefix("--config.") for item in rest if _is_override(item)))
        workdir = Path(arguments.workdir)
        place = find_place({flag: getattr(arguments, flag) for flag in FLAGS}, os.environ)
        return typed(tree, problems, lambda config: surroundings(config, workdir, place)), workdir
    except (ConfigError, StartError) as error:
        refuse(error)


def surroundings(config, workdir, place):
    """What of a configuration does not fit this machine, its files or the data."""
    # JAX takes three quarters of a GPU by default; a model that nearly fills it needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    # Collectives run beside computation only if the GPU compiler's scheduler is asked for it.
    overlap, flags = "--xla_gpu_enable_latency_hiding_scheduler", os.environ.get("XLA_FLAGS", "")
    gpus = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if gpus and overlap not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {overlap}=true".strip()
    if "host" in (config.optimizer.memory, config.train.ema_memory):
        # The client pins 64 GB at most; moments and average of a large model take more.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(64, memory)))
    if config.train.ema_memory == "host":
        # All streams share a GPU's queues for copies, by default few, and a copy waits for all before it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import jax

    from dsv3_jax import compilation_cache, data
    from dsv3_jax.config_checks import check_machine
    from dsv3_jax.config_reading import Problem
    from dsv3_jax.parallel import distributed, transport

    distributed.start(place)
    compilation_cache.use(Path.home() / ".cache" / "dsv3_jax" / "xla")
    found = data.check(config.data, config.model.vocab_size, config.train.seq_len)
    found += transport.problems(config.mesh.transport, jax.devices())
    if config.train.init_from:
        from dsv3_jax.training import initial

        found += initial.problems(config, workdir)
    return check_machine(config, len(jax.devices()), workdir) + [Problem(*problem) for problem in found]


def _is_override(item):
    return item.startswith("--config.") and "=" in item


def _joined(argv):
    """`--config.a.b value` as `--config.a.b=value`."""
    joined = []
    for item in argv:
        if (
            joined
            and joined[-1].startswith("--config.")
            and "=" not in joined[-1]
            and not item.startswith("--")
        ):
            joined[-1] += "=" + item
        else:
            joined.append(item)
    return joined


def load_config_file(path):
    """The ConfigDict of a configuration file."""
    from dsv3_jax.config_reading import ConfigError, Problem

    if not Path(path).is_file():
        names = ", ".join(sorted(str(found) for found in Path("configs").glob("*.py")))
        raise ConfigError([Problem("config", path, f"no such file; there are {names}")])
    spec = importlib.util.spec_from_file_location("run_config", path)
    assert spec is not None and spec.loader is not None  # A file that ends in .py, or Python refuses it here.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def refuse(error, code=2, everywhere=False) -> NoReturn:
    """Prints an error without a traceback and exits; one that is `everywhere` is printed by process 0."""
    from dsv3_jax.parallel import distributed

    if not everywhere or distributed.is_first():
        print(f"{distributed.who()}{error}", file=sys.stderr)
    distributed.leave(code)
    raise SystemExit(code)


# ------------------------------------------------------------------------------------------- the run


def train(config, workdir, stop):
    """Runs or continues a run; everything that it leaves is in `workdir`. Returns the exit code."""
    import jax

    from dsv3_jax.checkpoint.manager import CheckpointError, Checkpoints
    from dsv3_jax.data import DataError, Loader
    from dsv3_jax.parallel import distributed
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training import ema, loop, schedules
    from dsv3_jax.training.guard import Guard, TrainingDiverged
    from dsv3_jax.training.initial import first_state
    from dsv3_jax.training.report import NoReport, Report, write_json
    from dsv3_jax.training.state import abstract_state, parameter_count, shardings

    # 1. The parts: mesh, data, the step and the evaluation.
    check_kernels(config)
    mesh = make_mesh(config.mesh)
    devices = list(mesh.devices.flat)
    share = loop.data_share(mesh)
    seq_len, every = config.train.seq_len, config.checkpoint.every
    loader = Loader(config.data, split="train", seq_len=seq_len, seed=config.train.seed, **share)
    evaluate = loop.make_evaluation(config, mesh, share)
    abstract = {"train": abstract_state(config, mesh)}
    on_device = shardings(abstract["train"].params)
    layout = ema.shardings(on_device, config.train.ema_memory)
    run_step = loop.Steps(config, mesh, abstract["train"].params, layout)
    if config.train.ema_decay:
        abstract["ema"] = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract["train"].params,
            layout,
        )

    # 2. Where the run stands: its newest sound checkpoint, or the first state.
    distributed.share_folder(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", config)
    guard = Guard(config.train)
    step = tokens = 0
    try:
        restored = checkpoints.restore_latest(abstract)
        if restored is not None:
            loader.set_state(restored.extras["data"])
    except (CheckpointError, DataError) as error:
        refuse(f"This run cannot be resumed. {error}", 3, everywhere=True)
    if restored is not None:
        step, state, tokens = restored.step, restored.state, restored.extras["tokens"]
        guard.restore(restored.extras["guard"])
    else:
        state = {"train": first_state(config, mesh)}
        if config.train.ema_decay:
            state["ema"] = ema.init(state["train"].params, layout)
    report = NoReport()
    if distributed.is_first():
        write_json(workdir / "config.json", dataclasses.asdict(config))
        report = Report(workdir, config.train.steps, resumed_step=step)
    size = parameter_count(state["train"].params) / 1e6
    processes = f" of {distributed.count()} processes" if distributed.count() > 1 else ""
    report.note(f"{size:.1f}M parameters on {len(devices)} x {devices[0].device_kind}{processes}")
    if step:
        report.note(f"resumed at step {step}")
    elif report.dropped:
        report.note(f"no checkpoint in {workdir}: starting anew; {report.dropped} logged steps are dropped")
    if not step and config.train.init_from:
        report.note(f"weights of {config.train.init_from}")

    # 3. The loop. The host looks at a step only when the next one is on its way to the device.
    clock = {"seconds": time.perf_counter(), "tokens": tokens}

    def look(number, seen, metrics, rates, first, last, validation=None):
        """Checks a finished step, and logs it when its turn has come."""
        finite = bool(metrics.finite)
        data = f"sequences {first} to {last - 1}" if finite else loader.describe(first, last)
        try:
            message = guard.check(number, float(metrics.losses.loss), finite, data)
            if message:
                report.note(message)
        finally:  # The step that ends a run is on record too.
            every = config.train.log_every
            due = validation or not finite or number % every == 0 or number in (1, config.train.steps)
            if due and distributed.is_first():
                log(number, seen, metrics, rates, validation or {})

    def log(number, seen, metrics, rates, validation):
        speed = (seen - clock["tokens"]) / (time.perf_counter() - clock["seconds"])
        row = loop.metrics_row(config, metrics, rates, abstract["train"].params, speed, devices)
        row |= {"step": number, "tokens": seen, "bad_steps": guard.bad_steps}
        report.log(row | {name: loss for name, (loss, _) in validation.items()})
        clock.update(seconds=time.perf_counter(), tokens=seen)

    validation, pending, stopping = {}, None, False
    stop.training = True
    try:
        while step < config.train.steps and not stopping:
            sequences = schedules.batch_size_at(config, tokens)
            rates = loop.schedules_at(config, step, tokens)
            first = loader.position
            batch, n_micro = loop.put_batch(config, mesh, loader.take(sequences), sequences)
            metrics = run_step(state, batch, n_micro, rates)
            step, tokens = step + 1, tokens + sequences * seq_len
            if pending:
                look(*pending)
            pending = (step, tokens, metrics, rates, first, first + sequences)

            stopping = stop.agreed(mesh) is not None  # Once: the step after which it is seen is saved.
            last = step == config.train.steps
            validation = {}
            if last or config.train.eval_every and step % config.train.eval_every == 0:
                metrics.losses.loss.block_until_ready()
                started = time.perf_counter()
                params, router = state["train"].params, state["train"].router
                validation["validation_loss"] = evaluate(params, router)
                if config.train.ema_decay:
                    run_step.catch_up(state)
                    average = jax.device_put(state["ema"], on_device)
                    validation["ema_validation_loss"] = evaluate(average, router)
                clock["seconds"] += time.perf_counter() - started  # No part of the training speed.
                look(*pending, validation)
                pending = None
            due = every and (last or stopping or step % every == 0)
            if pending and (due or stopping):  # A step is on record before its checkpoint is.
                look(*pending)
                pending = None
            if due:
                run_step.catch_up(state)
                extras = {"tokens": tokens, "data": loader.get_state(), "guard": guard.state()}
                checkpoints.save(step, state, extras, {name: loss for name, (loss, _) in validation.items()})
    except TrainingDiverged as error:
        report.close()
        checkpoints.close()
        refuse(error, 3, everywhere=True)
    checkpoints.close()
    stop.training = False

    # 4. What the run leaves behind.
    if step >= config.train.steps:
        validation = validation or {"validation_loss": evaluate(state["train"].params, state["train"].router)}
        if distributed.is_first():
            found = validation["validation_loss"]
            loop.finish(config, state["train"], found, workdir, report, loader.tokenizer)
    else:
        saved = "saved; the same command continues" if every else "nothing saved, as checkpoint.every = 0"
        report.note(f"stopped on request after step {step}: {saved}")
    report.close()
    loader.close()
    distributed.finish()
    return stop.code if step < config.train.steps else 0


def check_kernels(config):
    """Refuses attention kernels that compute something else on this machine (3 if so).

    On CPU there is nothing to check: plain JAX runs there. `PALLAS_SELF_CHECK=0` leaves the check out.
    """
    import jax

    from pallas_kernels.self_check import SelfCheckError, self_check

    a = config.model.attention
    ours = a.kind == "mla" and a.implementation == "auto" and config.train.precision != "fp32"
    if jax.default_backend() == "cpu" or not ours:
        return
    widths = dict(d_nope=a.qk_nope_head_dim, d_rope=a.qk_rope_head_dim, d_v=a.v_head_dim)
    try:
        self_check(heads=a.n_heads, rank=a.kv_lora_rank, **widths)
    except SelfCheckError as error:
        refuse(error, 3)


def main(argv=None):
    from dsv3_jax.training.stop import Stop

    stop = Stop()
    from dsv3_jax.training.host_memory import keep_freed_memory

    keep_freed_memory()  # Before JAX makes its threads.
    # Our own messages as they are, whatever a library makes of the root logger.
    logger = logging.getLogger("dsv3_jax")
    logger.handlers, logger.propagate = [logging.StreamHandler()], False
    config, workdir = parse(sys.argv[1:] if argv is None else argv)
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.config_reading import ConfigError, Problem
    from dsv3_jax.data import DataError
    from dsv3_jax.parallel import distributed

    try:
        return train(config, workdir, stop)
    except DataError as error:
        refuse(ConfigError([Problem(*error.problem)]))
    except ConfigError as error:
        refuse(error)
    except (CheckpointError, OSError) as error:  # A full disk, for one.
        distributed.await_loss(error)
        refuse(error, 3)
    except Exception as error:
        distributed.give_up(error)
        raise


if __name__ == "__main__":
    sys.exit(main())
