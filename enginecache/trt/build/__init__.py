"""Plans from models, in a child process: see :class:`enginecache.trt.build.process.ProcessBuilder`."""
