"""The console command `dsv3`: one module a subcommand.

A module of this package is a subcommand if it has `add_parser(subparsers)`, which adds its parser and sets
`run` with `parser.set_defaults(run=run)`, with `overrides=[]` too if it takes `--config.FIELD=VALUE`, and
`run(args) -> int | None`, the exit code. Modules import what is heavy inside `run`, so that `dsv3 --help`
answers at once.
"""

import argparse
import importlib
import logging
import pkgutil
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; exit codes: 0 done, 1 the work failed, 2 the command line is wrong, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dsv3", description="DeepSeek-V3 in JAX.", allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in pkgutil.iter_modules(__path__):
        command = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(command, "add_parser"):
            command.add_parser(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # Of a subcommand that takes `--config.FIELD=VALUE`.
        args.overrides = [item.removeprefix("--config.") for item in unknown if _is_override(item)]
        unknown = [item for item in unknown if not _is_override(item)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that nobody here needs.
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _is_override(item: str) -> bool:
    return item.startswith("--config.") and "=" in item


def console() -> None:
    """The entry point of the installed command."""
    raise SystemExit(main())
