"""Locks: one build per key."""
