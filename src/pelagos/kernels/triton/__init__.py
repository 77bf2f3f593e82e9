"""Triton kernels, imported only when a CUDA tensor (or the interpreter) asks for them."""
