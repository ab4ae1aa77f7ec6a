"""`fp8_matmul` for Hopper: the grouped kernels with one group, whose tiles are known when compiling."""

from pallas_kernels.fp8_grouped_matmul import mosaic_gpu, mosaic_gpu_wgrad

unsupported = mosaic_gpu.unsupported


def matmul(lhs, rhs, *, out_dtype, promote=True, tiling=None):
    """`lhs @ rhs.T`, `rhs` with block scales or with row scales."""
    n, k = rhs.values.shape
    by_block = rhs.scales.shape == (-(-n // mosaic_gpu.SCALED), -(-k // mosaic_gpu.SCALED))
    kernel = mosaic_gpu.dense if by_block else mosaic_gpu_wgrad.dense
    return kernel(lhs, rhs, out_dtype=out_dtype, promote=promote, tiling=tiling)
