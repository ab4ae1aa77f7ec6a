"""Few rows, each multiplied by the matrix that it names: the products of a decode step at small batches.

`out[i] = lhs[i] @ rhs[indices[i]]`. A token that has chosen its experts reads their weights and no others';
with one group it is a matrix-vector product. The cost is that of reading `rows` matrices.
"""

import functools

import jax
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import implementations
from pallas_kernels.gather_matvec import mosaic_gpu, reference, sliced

# Each module offers `product(lhs, rhs, indices, rows_alike)` and `unsupported` of the arrays.
_MODULES = {"reference": reference, "sliced": sliced, "mosaic_gpu": mosaic_gpu}
IMPLEMENTATIONS = tuple(_MODULES)


def gather_matvec(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"],
    indices: Int[Array, " rows"],
    *,
    rows_alike: int | None = None,
    implementation: str = "auto",
) -> Float32[Array, "rows n"]:
    """Multiplies row i of `lhs` by `rhs[indices[i]]`, accumulated and returned in float32.

    Not differentiable on every platform: it is for generation.

    Args:
      lhs: the rows.
      rhs: the matrices, in the dtype of `lhs`.
      indices: the matrix of each row, in `[0, groups)`.
      rows_alike: `"mosaic_gpu"` divides its work, and so the order of a row's sum, by the number of rows.
        Calls that give the same number here find the same for a row to the bit, however many rows they have.
      implementation: `"auto"`, or one by name: `"mosaic_gpu"` (Hopper, bf16), `"sliced"` (plain JAX, a
        product a row) or `"reference"` (gathers the matrices).

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or indices.shape != lhs.shape[:1]:
        raise ValueError(
            f"gather_matvec: lhs {lhs.shape}, rhs {rhs.shape} and indices {indices.shape} do not fit; "
            "expected [rows, k], [groups, k, n] and [rows]"
        )
    constraints = {
        name: functools.partial(module.unsupported, lhs, rhs, indices) for name, module in _MODULES.items()
    }
    ours = ("mosaic_gpu",) if implementations.on_one_device() else ()
    preference = {"cpu": ("sliced",), "gpu": (*ours, "reference"), "tpu": ("sliced",)}
    chosen = implementations.choose("gather_matvec", implementation, constraints, preference)
    with jax.named_scope(f"gather_matvec_{chosen}"):
        return _MODULES[chosen].product(lhs, rhs, indices, rows_alike or len(lhs))
