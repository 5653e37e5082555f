"""Plans from models, in a child process: see :class:`enginecache.builders.child.ProcessBuilder`."""
