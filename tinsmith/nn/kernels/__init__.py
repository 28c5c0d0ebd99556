"""Triton kernels. Each equals a plain PyTorch version in `nn/attention`."""
