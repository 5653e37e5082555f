"""From a stored plan to an engine: in a child process on trial, and in this one."""
