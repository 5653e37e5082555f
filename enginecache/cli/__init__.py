"""The command line. Empty: the fast path is imported through it."""
