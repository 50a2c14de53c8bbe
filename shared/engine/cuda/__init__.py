"""The cuda engine: quantized MoE models on NVIDIA GPUs; see docs/kernels.md."""
