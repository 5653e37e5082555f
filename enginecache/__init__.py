"""enginecache: a cache of TensorRT engines, keyed by everything that decides them."""
