"""Few rows, each multiplied by the matrix that it names: the products of a decode step at small batches.

`out[i] = lhs[i] @ rhs[indices[i]]`. A token that has chosen its experts reads their weights and no others';
with one group it is a matrix-vector product. The cost is that of reading `rows` matrices.
"""

import functools

import jax
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import implementations
from pallas_kernels.gather_matvec import mosaic_gpu, reference, sliced

# Each module offers `product(lhs, rhs, indices, each, alike)` and `unsupported` of the arrays.
_MODULES = {"reference": reference, "sliced": sliced, "mosaic_gpu": mosaic_gpu}
IMPLEMENTATIONS = tuple(_MODULES)


def gather_matvec(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"],
    indices: Int[Array, " products"],
    *,
    each: int = 1,
    alike: int | None = None,
    implementation: str = "auto",
) -> Float32[Array, "products n"]:
    """Multiplies row `i // each` of `lhs` by `rhs[indices[i]]`, accumulated and returned in float32.

    Not differentiable on every platform: it is for generation.

    Args:
      lhs: the rows; those behind the last that a product asks for are not read.
      rhs: the matrices, in the dtype of `lhs`.
      indices: the matrix of each product, in `[0, groups)`.
      each: how many products in turn read the same row.
      alike: `"mosaic_gpu"` divides its work, and with it the order of sums, by the number of products. Calls
        that give the same number here find the same to the bit, however many products they have.
      implementation: `"auto"`, or one by name: `"mosaic_gpu"` (Hopper, bf16), `"sliced"` (plain JAX, a
        product a row) or `"reference"` (gathers the matrices).

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    shaped = lhs.ndim == 2 and rhs.ndim == 3 and indices.ndim == 1 and lhs.shape[1] == rhs.shape[1]
    if not shaped or each < 1 or len(indices) > each * len(lhs):
        raise ValueError(
            f"gather_matvec: lhs {lhs.shape}, rhs {rhs.shape} and indices {indices.shape} do not fit; "
            f"expected [rows, k], [groups, k, n] and [products], of which a row has at most each={each}"
        )
    constraints = {
        name: functools.partial(module.unsupported, lhs, rhs, indices) for name, module in _MODULES.items()
    }
    ours = ("mosaic_gpu",) if implementations.on_one_device() else ()
    preference = {"cpu": ("sliced",), "gpu": (*ours, "reference"), "tpu": ("sliced",)}
    chosen = implementations.choose("gather_matvec", implementation, constraints, preference)
    with jax.named_scope(f"gather_matvec_{chosen}"):
        return _MODULES[chosen].product(lhs, rhs, indices, each, alike or len(indices))
