"""`python -m dsv3_jax.cli`: the command without an installation."""

from dsv3_jax.cli import console

if __name__ == "__main__":
    console()
