"""`dsv3 generate`: text from a trained or a released model."""

import argparse
import sys
from pathlib import Path

DTYPES = ("fp32", "bf16")
CACHE_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int8")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate`, `eval` and `serve` have in common."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a work directory of train.py, a folder of `dsv3 import`, or of Hugging Face",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="T", help="a tokenizer.json, or 'byte'; default: the folder's"
    )
    parser.add_argument(
        "--dtype", default="", choices=DTYPES, help="of weights and activations; default: bf16, on CPU fp32"
    )


def add_generator_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` and `serve` have in common."""
    add_model_arguments(parser)
    parser.add_argument(
        "--cache-dtype",
        default=None,
        choices=CACHE_DTYPES,
        help="of the latent cache; default: that of --dtype",
    )
    parser.add_argument(
        "--speculate",
        nargs="?",
        type=int,
        const=-1,
        default=0,
        metavar="D",
        help="draft D tokens a step with the model's MTP depths (without D: all of them)",
    )


def load_model(arguments: argparse.Namespace):
    """(`folders.Loaded`, dtype) of the arguments."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.generation import folders

    name = arguments.dtype or ("fp32" if jax.default_backend() == "cpu" else "bf16")
    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[name]
    return folders.load(arguments.checkpoint, tokenizer=arguments.tokenizer, dtype=dtype), dtype


def drafts(arguments: argparse.Namespace, config) -> int:
    """Drafts a step; `--speculate` alone takes all depths of the model."""
    from dsv3_jax.generation import RequestError

    if arguments.speculate == -1 and not config.mtp.depth:
        raise RequestError("--speculate, but the model has no MTP depth to draft with (model.mtp.depth is 0)")
    return config.mtp.depth if arguments.speculate == -1 else arguments.speculate


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("generate", help="text from a model", description=__doc__)
    add_generator_arguments(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="the text to continue; '' starts a document")
    given.add_argument("--prompt-file", metavar="F", type=Path, help="a file with the text; '-' is stdin")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.6, metavar="T", help="0: the most probable token"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="of the K most probable tokens; 0: all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="of the nucleus of probability P"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="at least P times the best one's"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends before it; repeatable"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Streams the text to stdout; speed and acceptance go to stderr. Returns the exit code."""
    from dsv3_jax.config_reading import ConfigError
    from dsv3_jax.convert.errors import ConversionError
    from dsv3_jax.data import DataError
    from dsv3_jax.generation import Generator, RequestError, SamplingParams
    from pallas_kernels.self_check import SelfCheckError

    try:
        params = SamplingParams(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            stop_strings=tuple(arguments.stop),
        )
        prompt = arguments.prompt if arguments.prompt_file is None else _read(arguments.prompt_file)
        loaded, dtype = load_model(arguments)
        generator = Generator(
            loaded.config,
            loaded.variables,
            loaded.tokenizer,
            dtype=dtype,
            cache_dtype=arguments.cache_dtype,
            speculate=drafts(arguments, loaded.config),
            prefix=loaded.prefix,
        )
        del loaded  # The generator has its own copy of the weights.
        for piece in generator.stream(prompt, params):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        print()
    except (RequestError, ConversionError, DataError, ConfigError, SelfCheckError, OSError) as error:
        print(f"dsv3 generate: {error}", file=sys.stderr)
        return 2
    print(generator.statistics.summary(), file=sys.stderr)
    return 0


def _read(path: Path) -> str:
    return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
