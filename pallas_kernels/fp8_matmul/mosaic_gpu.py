"""`fp8_matmul` for Hopper: the grouped kernels with one group, whose tiles are known when compiling."""

from pallas_kernels.fp8_grouped_matmul import mosaic_gpu, mosaic_gpu_wgrad

adds_into, unsupported = mosaic_gpu.adds_into, mosaic_gpu.unsupported


def matmul(lhs, rhs, *, out_dtype, promote=True, tiling=None, accumulate=None):
    """`lhs @ rhs.T`, `rhs` with block scales or with row scales; added to `accumulate`, see `adds_into`."""
    n, k = rhs.values.shape
    by_block = rhs.scales.shape == (-(-n // mosaic_gpu.SCALED), -(-k // mosaic_gpu.SCALED))
    kernel = mosaic_gpu.dense if by_block else mosaic_gpu_wgrad.dense
    options = dict(out_dtype=out_dtype, promote=promote, tiling=tiling, accumulate=accumulate)
    return kernel(lhs, rhs, **options)
