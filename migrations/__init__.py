"""Alembic scripts of the registry; installed as ``enginecache.migrations``."""
