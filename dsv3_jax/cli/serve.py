"""`dsv3 serve`: the OpenAI completions and chat-completions protocol over continuous batching."""

import argparse
import ipaddress
import sys
from pathlib import Path

from dsv3_jax.cli.generate import add_generator_arguments, drafts, load_model


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("serve", help="an OpenAI-compatible server", description=__doc__)
    add_generator_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model-name", default="", metavar="NAME", help="default: the folder's name")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="texts decoded together")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="of a prompt and its completion together"
    )
    parser.add_argument("--page-size", type=int, default=64, metavar="N", help="tokens of a cache page")
    parser.add_argument(
        "--pages", type=int, default=0, metavar="N", help="of the cache; default: all slots at --max-tokens"
    )
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="texts that may wait; then 429")
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="prompt tokens between two steps")
    parser.set_defaults(run=run)


def warn_of(host: str) -> None:
    """Says on stderr when other machines reach a server on `host`, a name or an address."""
    try:
        ours = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        ours = host.lower() in ("localhost", "localhost.localdomain")
    if not ours:
        print(
            f"dsv3 serve: warning: --host {host} answers other machines, without authentication or "
            "encryption; put a proxy that has both before it, or leave --host out",
            file=sys.stderr,
            flush=True,
        )


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C. Returns the exit code."""
    try:
        import uvicorn

        from dsv3_jax.serving.app import Server
    except ImportError as error:
        print(f"dsv3 serve: {error}; install the extra: pip install 'dsv3-jax[serve]'", file=sys.stderr)
        return 2
    import jax

    from dsv3_jax.config_reading import ConfigError
    from dsv3_jax.convert.errors import ConversionError
    from dsv3_jax.data import DataError
    from dsv3_jax.generation import RequestError
    from dsv3_jax.generation.engine import Engine
    from dsv3_jax.generation.requests import Limits
    from dsv3_jax.generation.weights import prepare
    from pallas_kernels.self_check import SelfCheckError

    names = ("slots", "max_tokens", "page_size", "queue", "chunk")
    try:
        for name in names:
            if getattr(arguments, name) < 1:
                raise RequestError(
                    f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give at least 1"
                )
        loaded, dtype = load_model(arguments)
        limits = Limits(**{name: getattr(arguments, name) for name in (*names, "pages")})
        engine = Engine(
            loaded.config,
            jax.jit(prepare, static_argnums=(1, 2))(loaded.variables, loaded.config, dtype),
            loaded.tokenizer,
            limits,
            cache_dtype=arguments.cache_dtype or {"float32": "fp32", "bfloat16": "bf16"}[dtype.dtype.name],
            drafts=drafts(arguments, loaded.config),
        )
    except (RequestError, ConversionError, DataError, ConfigError, SelfCheckError, OSError) as error:
        print(f"dsv3 serve: {error}", file=sys.stderr)
        return 2
    name = arguments.model_name or Path(arguments.checkpoint).resolve().name
    file, prefix = loaded.tokenizer_file, loaded.prefix
    server = Server(engine, loaded.tokenizer, name, tokenizer_file=file, prefix=prefix)
    del loaded
    warn_of(arguments.host)
    print("compiling", file=sys.stderr, flush=True)
    engine.warm_up()
    print(f"serving {name!r} on http://{arguments.host}:{arguments.port}/v1", file=sys.stderr, flush=True)
    uvicorn.run(server.app, host=arguments.host, port=arguments.port, log_level="warning")
    return 0
