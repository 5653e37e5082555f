"""The registry: rows about models, entries, blobs, builds, pins and misses."""
