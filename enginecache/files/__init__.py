"""Values and files that know nothing of engines: units, canonical JSON, digests, fingerprints, mounts."""
