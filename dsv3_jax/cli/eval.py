"""`dsv3 eval`: perplexity and multiple choice on local JSONL files."""

import argparse
import json
import sys

from dsv3_jax.cli.generate import add_model_arguments, load_model


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("eval", help="perplexity and multiple choice", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--perplexity", action="append", default=[], metavar="F", help='JSONL of {"text": ...}; repeatable'
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="where the text is; default: text"
    )
    parser.add_argument(
        "--multiple-choice",
        action="append",
        default=[],
        metavar="F",
        help='JSONL of {"question": text, "choices": [texts], "answer": number}; repeatable',
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a JSON object a file. Returns the exit code."""
    from dsv3_jax import evaluation
    from dsv3_jax.config_reading import ConfigError
    from dsv3_jax.convert.errors import ConversionError
    from dsv3_jax.data import DataError
    from dsv3_jax.generation import RequestError

    try:
        if not arguments.perplexity and not arguments.multiple_choice:
            raise RequestError("nothing to do: give --perplexity FILE or --multiple-choice FILE")
        if arguments.batch_size < 1:
            raise RequestError(f"--batch-size is {arguments.batch_size}: give at least 1")
        loaded, dtype = load_model(arguments)
        scorer = evaluation.Scorer(
            loaded.config,
            loaded.variables,
            loaded.tokenizer,
            dtype=dtype,
            prefix=loaded.prefix,
            batch_size=arguments.batch_size,
        )
        for path in arguments.perplexity:
            _show(path, evaluation.perplexity(scorer, path, arguments.text_field))
        for path in arguments.multiple_choice:
            _show(path, evaluation.multiple_choice(scorer, path))
    except (RequestError, ConversionError, DataError, ConfigError, OSError) as error:
        print(f"dsv3 eval: {error}", file=sys.stderr)
        return 2
    return 0


def _show(path: str, results: dict[str, float]) -> None:
    print(json.dumps({"file": path, **results}), flush=True)
