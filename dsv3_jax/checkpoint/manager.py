"""Saving and resuming a run with Orbax's CheckpointManager.

A checkpoint is one directory, `<directory>/<step>`, and one unit: the state (any tree of arrays), the
host's JSON (data position, counters), the config and the metrics. It is written in the background to a
temporary directory and committed by a rename, so a kill at any moment leaves the ones before it intact:

    <step>.orbax-checkpoint-tmp   being written; never read, removed by the next run that saves
    <step>                        committed, with a digest of every file (see `integrity`)
    trash/<step>                  no longer kept; renamed first, then deleted
    <step>.damaged                found damaged and moved aside; never deleted

Several processes write and read one directory, which they share: each its own arrays. Process 0 alone
verifies, digests, commits, tidies up, and decides what all restore.
"""

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.checkpoint import failures, integrity
from dsv3_jax.config import Config
from dsv3_jax.parallel import distributed

log = logging.getLogger(__name__)

METRIC = "validation_loss"
TRASH = "trash"
DAMAGED = ".damaged"
TEMPORARY = ".orbax-checkpoint-tmp"
# Config outside `model` that changes what the state holds.
STATE_FIELDS = ("optimizer.moment_dtype", "train.ema_decay")


class CheckpointError(RuntimeError):
    """A run cannot be resumed or saved; the message says why and what to do."""


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` found."""

    step: int
    state: Any
    extras: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Orbax is imported when there is one to read or write.

    Of a job of several processes, all call every method, in the same order.

    Args:
      directory: where they are; made by the first save.
      config: the run. `config.checkpoint.keep_last` newest and `keep_best` of lowest validation loss are
        kept; the config is saved with each, and names the fields when a state does not fit.
    """

    def __init__(self, directory: str | Path, config: Config):
        self._directory = Path(directory).absolute()
        self._config = config
        self._orbax: Any = None
        self._saving: int | None = None  # The step whose digest the background thread will write.
        self._sweeper: threading.Thread | None = None

    def save(
        self, step: int, state: Any, extras: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to save; returns once the arrays are copied, and the caller may donate them.

        Waits first for the save before it. Does nothing if `step` has a checkpoint.

        Args:
          step: optimizer steps taken.
          state: a tree of arrays.
          extras: JSON of the host: data position, counters. Copied at once.
          metrics: numbers; "validation_loss" ranks the checkpoint, and without it is the worst.

        Raises:
          CheckpointError: this save, or the one before it, could not be written.
        """
        with self._writing():
            self._save(step, state, extras, metrics or {})

    def _save(self, step: int, state: Any, extras: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        import orbax.checkpoint as ocp

        manager = self._manager()
        manager.wait_until_finished()
        self._saving = step
        if distributed.from_first(lambda: step in self._steps()):
            return
        self._empty_trash()
        # The background thread writes it: a copy, which the caller cannot change.
        host = json.loads(json.dumps({"extras": dict(extras), "config": dataclasses.asdict(self._config)}))
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                extras=ocp.args.JsonSave(host["extras"]),
                config=ocp.args.JsonSave(host["config"]),
            ),
            metrics={name: float(value) for name, value in metrics.items()},
            force=True,  # Orbax's own rule would refuse a step before the latest.
        )

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest sound checkpoint, laid out as `abstract_state` says; None if there never was one.

        Every file is verified first. A damaged checkpoint is logged, one line a file, moved aside, and
        the one before it is taken.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings of the current mesh, which may
            differ from the one that saved.

        Raises:
          CheckpointError: there are checkpoints, but none is sound, or the state in the newest sound one
            is not that of the config.
        """
        self.wait()
        step = distributed.from_first(self._newest_sound_step, CheckpointError)
        if step is None:
            return None
        import orbax.checkpoint as ocp
        from etils import epath

        path = self._directory / str(step)
        # Not through the manager: making it tidies the directory, which is the saving run's to do.
        handler = ocp.StandardCheckpointHandler()
        self._check_fit(path, handler.metadata(epath.Path(path / "state")).tree, abstract_state)
        with ocp.Checkpointer(handler) as checkpointer:
            state = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(abstract_state))
        return Restored(step, state, _read_json(path / "extras"))

    def wait(self) -> None:
        """Blocks until the save under way is committed; a CheckpointError says that it could not be."""
        if self._orbax is not None:
            with self._writing():
                self._orbax.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way (see `wait`) and deletes what is no longer kept."""
        if self._orbax is None:
            return
        with self._writing():
            self._orbax.close()
        self._orbax = None
        if self._sweeper is not None:
            self._sweeper.join()
        if distributed.is_first():
            shutil.rmtree(self._directory / TRASH, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore says with a ValueError that a disk is full.
            raise CheckpointError(
                f"The checkpoint of step {self._saving} could not be written to {self._directory}: "
                f"{failures.reason(error)}. With that mended, the same command continues from the "
                "checkpoint before it."
            ) from error

    def _manager(self) -> Any:
        """Orbax's manager, made on first use, when what a killed run left half-done has been removed."""
        if self._orbax is not None:
            return self._orbax
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        failures.silence()
        distributed.from_first(self._tidy_up)
        keep = self._config.checkpoint
        best = policies.BestN(
            get_metric_fn=_loss, reverse=True, n=keep.keep_best, keep_checkpoints_without_metrics=False
        )
        self._orbax = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep.keep_last), best]),
                best_fn=_loss,  # Makes Orbax save the metrics.
                best_mode="min",
                todelete_subdir=TRASH,
                save_root_metadata=False,
                # Runs when all is written and nothing renamed yet.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digest),
            ),
        )
        return self._orbax

    def _tidy_up(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name == TRASH or TEMPORARY in path.name:
                shutil.rmtree(path)
        # The manager reads the small files of every checkpoint and would fail on a damaged one.
        for step in self._steps():
            self._move_aside_if_damaged(step, quick=True)

    def _write_digest(self) -> None:
        """Called by process 0, when all have written their arrays."""
        integrity.write_digest(self._directory / f"{self._saving}{TEMPORARY}")

    def _empty_trash(self) -> None:
        """Deletes in the background what Orbax has renamed into the trash."""
        if not distributed.is_first():
            return
        if self._sweeper is not None:
            self._sweeper.join()
        trash = self._directory / TRASH
        # Only what is there now: Orbax may add to it while the thread runs.
        paths = list(trash.iterdir()) if trash.exists() else []
        self._sweeper = threading.Thread(target=lambda: [shutil.rmtree(path) for path in paths])
        self._sweeper.start()

    def _steps(self) -> list[int]:
        """Committed steps, in increasing order."""
        if not self._directory.exists():
            return []
        names = [path.name for path in self._directory.iterdir()]
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def _newest_sound_step(self) -> int | None:
        for step in reversed(self._steps()):
            if not self._move_aside_if_damaged(step):
                return step
        if self._directory.exists() and any(DAMAGED in path.name for path in self._directory.iterdir()):
            raise CheckpointError(
                f"{self._directory} holds checkpoints, but none of them is sound (see the *{DAMAGED} folders "
                "there). Put a sound copy back, or start anew in another --workdir."
            )
        return None

    def _move_aside_if_damaged(self, step: int, quick: bool = False) -> bool:
        path = self._directory / str(step)
        found = integrity.problems(path, quick)
        for problem in found:
            log.error("checkpoint %s is damaged: %s", path, problem)
        if found:
            aside = path.with_name(path.name + DAMAGED)
            count = 1
            while aside.exists():
                count += 1
                aside = path.with_name(f"{path.name}{DAMAGED}.{count}")
            path.rename(aside)
            log.error("moved it to %s", aside)
            if self._orbax is not None:
                self._orbax.reload()
        return bool(found)

    def _check_fit(self, path: Path, saved_state: Any, abstract_state: Any) -> None:
        """Raises CheckpointError unless the saved tree has the leaves, shapes and dtypes expected."""
        import orbax.checkpoint as ocp

        def flat(tree: Any) -> dict[str, str]:
            leaves = ocp.tree.to_flat_dict(tree, sep="/")
            return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}

        saved, wanted = flat(saved_state), flat(abstract_state)
        names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
        if not names:
            return
        lines = [f"The state in {path} is not that of this config:"]
        current = json.loads(json.dumps(dataclasses.asdict(self._config)))
        lines += _config_differences(_read_json(path / "config"), current)
        lines += [
            f"  {name} is {saved.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} here"
            for name in names[:5]
        ]
        if len(names) > 5:
            lines.append(f"  ... and {len(names) - 5} more arrays")
        lines.append(
            "Set the fields back to what the checkpoint has, or use another --workdir to start anew."
        )
        raise CheckpointError("\n".join(lines))


def _read_json(item: Path) -> Any:
    """The JSON that Orbax's JsonSave wrote for an item of a checkpoint."""
    return json.loads((item / "metadata").read_text(encoding="utf-8"))


def _loss(metrics: Mapping[str, Any]) -> float:
    """The validation loss to rank by; infinite, the worst, if there is none or it is not finite."""
    value = metrics.get(METRIC)
    return value if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _config_differences(saved: Any, current: Any, prefix: str = "") -> list[str]:
    """A line for each field that differs and that can change what the state holds."""
    lines = []
    for name in {**saved, **current}:
        path = prefix + name
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _config_differences(old, new, path + ".")
        elif old != new and (path.startswith("model.") or path in STATE_FIELDS):
            lines.append(f"  {path} is {old!r} in the checkpoint and {new!r} here")
    return lines
