"""`dsv3 import`: a released model, or a training run, as a folder of parameters that Orbax reads."""

import argparse
import time
from pathlib import Path


def add_parser(subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "import",
        help="convert a Hugging Face folder, or the parameters of a training run, to a folder of ours",
        description="Converts a Hugging Face folder (or a run's checkpoint: its parameters alone) to a "
        "folder that dsv3 loads, and Orbax too. After an interruption the same command goes on.",
    )
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
    parser.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR", help="must not exist")
    parser.add_argument("--keep-fp8", action="store_true", help="keep E4M3 and its scales; default: bfloat16")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dsv3_jax.cli import _shared
    from dsv3_jax.training.host_memory import keep_freed_memory

    _shared.on_cpu()
    keep_freed_memory()  # Buffers are kept from one piece to the next.
    from dsv3_jax.convert import native, opened
    from dsv3_jax.convert.errors import ConversionError

    start, progress = time.monotonic(), _shared.Progress("import")
    try:
        with opened.open_source(args.source, keep_fp8=args.keep_fp8) as source:
            for note in source.notes:
                print(note)
            if source.unused:
                print(f"config.json: kept, without a part in the logits: {', '.join(source.unused)}")
            native.write(source.source, args.target, source.huggingface, source.extras, progress)
    except ConversionError as error:
        return _shared.fail(error)
    print(f"{args.target}: {progress.total / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")
    return 0
