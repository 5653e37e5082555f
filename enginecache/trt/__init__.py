"""Everything that runs TensorRT, in child processes or in the caller's."""
