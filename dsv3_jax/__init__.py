"""DeepSeek-V3 in JAX: the model, its training, inference and conversion."""
