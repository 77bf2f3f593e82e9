"""Reference operators: plain torch, float32 where the released code is, differentiable, no CUDA-only call."""
