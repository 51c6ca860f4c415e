"""The kernels in Triton, and what launches them: the only files that import triton."""
