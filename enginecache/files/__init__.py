"""Values and files that know nothing of engines: units, times, canonical JSON."""
