"""Triton kernels, one family a file; importing this package does not import triton."""
