"""The machine: GPUs, installed TensorRT, and evidence that they have not changed."""
