"""`dsv3 inspect`: what a configuration, or a folder with a model, consists of."""

import argparse
import math
from pathlib import Path


def add_parser(subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="parameters by part, cache and bytes of a configuration or of a folder",
        description="Prints total and active parameters by part, the cache of a token, and the bytes of the "
        "parameters by dtype. Nothing of the model is allocated.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="a file of configs/")
    what.add_argument(
        "folder", nargs="?", type=Path, help="a Hugging Face folder, one of ours, or a training run"
    )
    parser.add_argument(
        "--write-config", type=Path, metavar="FILE", help="write a configuration that fine-tunes the folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dsv3_jax.cli import _shared

    _shared.on_cpu()
    from dsv3_jax.config_reading import ConfigError
    from dsv3_jax.convert import opened
    from dsv3_jax.convert.errors import ConversionError

    if args.config and args.write_config:
        return _shared.fail(
            "--write-config writes a configuration for a folder: give one in place of --config"
        )
    try:
        if args.config:
            config = _config(args.config)
            print("\n".join([*_model(config), *_if_stored(config)]))
        else:
            with opened.open_source(args.folder, keep_fp8=True) as source:
                print("\n".join([*_model(source.config), *_stored(source), *_notes(source)]))
                if args.write_config:
                    _write_config(source, args.folder, args.write_config)
    except (ConversionError, ConfigError, OSError) as error:
        return _shared.fail(error)
    return 0


def _write_config(source, folder: Path, file: Path) -> None:
    from dsv3_jax.convert import run_config
    from dsv3_jax.generation.folders import tokenizer_of

    with file.open("x", encoding="utf-8") as out:  # "x": an edited one is not overwritten.
        out.write(run_config.text(source.config, folder, tokenizer_of(folder), file))
    print(f"\n{file}: python train.py --config={file} --workdir=runs/fine-tune")


def _config(path: Path):
    from dsv3_jax.cli import _shared
    from dsv3_jax.config_checks import typed

    return typed(_shared.load_config(path)).model


def _model(config) -> list[str]:
    from dsv3_jax import inspection

    main, extra = inspection.count_parameters(config)
    lines = [f"{'parameters':<28}{'total':>20}{'active':>18}"]
    lines += [_line(part, count) for part, count in main.items()]
    whole = inspection.total(main)
    lines.append(_line("main model", whole))
    if not config.tie_embeddings:
        # The embedding is looked up: no product of a token uses more than a row of it.
        lines.append(f"{'  without the embedding':<48}{whole.active - main['embedding'].active:>18,}")
    if extra:
        lines += [_line(f"prediction: {part}", count) for part, count in extra.items()]
        lines.append(_line("prediction layers", inspection.total(extra)))
        lines.append(_line("with prediction layers", whole + inspection.total(extra)))
    elements = inspection.cache_elements(config)
    lines.append(f"\ncache of a token             {elements:,} elements: {2 * elements:,} bytes in bfloat16")
    return lines


def _line(name: str, count) -> str:
    return f"{name:<28}{count.total:>20,}{count.active:>18,}"


def _if_stored(config) -> list[str]:
    """Bytes of the parameters in the dtypes that they are commonly kept in."""
    from dsv3_jax.convert import export_plan, fp8, mapping

    sizes = {"float32": 0, "bfloat16": 0, "E4M3 as released": 0}
    for tensor in mapping.tensors(config).values():
        if tensor.copy_of or not tensor.leaf or tensor.leaf[0] != "params":
            continue
        size = math.prod(tensor.shape)
        sizes["float32"] += 4 * size
        sizes["bfloat16"] += 2 * size
        quantised = export_plan.is_quantised(tensor)
        scales = 4 * math.prod(fp8.scale_shape(tensor.shape)) if quantised else size
        sizes["E4M3 as released"] += size + scales
    return ["bytes of the parameters", *(f"  {name:<26}{size:>20,}" for name, size in sizes.items())]


def _stored(source) -> list[str]:
    by_dtype: dict[str, int] = {}
    for path, leaf in source.source.leaves.items():
        dtype = source.source.dtypes[path]
        by_dtype[str(dtype)] = by_dtype.get(str(dtype), 0) + math.prod(leaf.shape) * dtype.itemsize
    return ["bytes in the folder", *(f"  {name:<26}{size:>20,}" for name, size in sorted(by_dtype.items()))]


def _notes(source) -> list[str]:
    lines = ["", *source.notes] if source.notes else []
    if source.unused:
        lines.append(f"config.json: without a part in the logits: {', '.join(source.unused)}")
    return lines
