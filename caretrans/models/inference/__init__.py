"""Forms of the networks for inference: fused, for phones, for batched matmuls."""
