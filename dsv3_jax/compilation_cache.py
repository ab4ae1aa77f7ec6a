"""Compiled programs kept on disk, so that the next start is quick."""

import os
import re
import warnings
from pathlib import Path

import jax


def use(default: str | Path) -> None:
    """Keeps compiled programs in the folder that JAX_COMPILATION_CACHE_DIR names, else in `default`.

    A program whose writing a kill cut short is deleted when it is read, compiled and written again: JAX by
    itself warns of it at every start and keeps it.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(default))
    folder = Path(given or default)
    show = warnings.showwarning

    def look(message, *where, **more):
        cut = re.match("Error reading persistent compilation cache entry for '(.+?)'", str(message))
        if not cut:
            return show(message, *where, **more)
        for path in folder.glob(f"{cut[1]}-*-cache"):
            path.unlink(missing_ok=True)

    warnings.showwarning = look
