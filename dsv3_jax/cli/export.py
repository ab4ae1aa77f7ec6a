"""`dsv3 export`: a model as a Hugging Face folder."""

import argparse
import time
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="write a Hugging Face folder from a folder of ours or from a training run",
        description="Writes a Hugging Face folder. What was imported unchanged comes back with the same "
        "files, names and bytes. After an interruption the same command goes on.",
    )
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
    parser.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR", help="must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors; default: as they are stored")
    parser.add_argument("--fp8", action="store_true", help="linear layers in E4M3 with scales of 128x128")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dsv3_jax.cli import _shared
    from dsv3_jax.training.host_memory import keep_freed_memory

    _shared.on_cpu()
    keep_freed_memory()  # Buffers are kept from one piece to the next.
    import ml_dtypes
    import numpy as np

    from dsv3_jax.convert import export, export_plan, opened
    from dsv3_jax.convert.errors import ConversionError

    start, progress = time.monotonic(), _shared.Progress("export")
    dtype = np.dtype(getattr(ml_dtypes, args.dtype, args.dtype)) if args.dtype else None
    try:
        with opened.open_source(args.source, keep_fp8=True) as source:
            arrays = source.source if dtype is None and not args.fp8 else source.dequantised()
            output = export_plan.plan(
                arrays, like=source.huggingface, dtype=dtype, quantise=args.fp8, extras=source.extras
            )
            export.write(arrays, args.target, output, progress)
    except ConversionError as error:
        return _shared.fail(error)
    count = sum(len(tensors) for tensors in output.files.values())
    seconds = time.monotonic() - start
    print(f"{args.target}: {count} tensors, {progress.total / 1e9:.2f} GB in {seconds:.1f} s")
    return 0
