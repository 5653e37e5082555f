"""The conversion of a graph to FP16 or BF16 before TensorRT builds it; only child processes import it."""
