"""The check of the numbers: what an engine, or the graph that it is built from, computes against a reference."""
