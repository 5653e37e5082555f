"""Values and files without knowledge of engines: units, canonical JSON, digests, fingerprints, mounts."""
