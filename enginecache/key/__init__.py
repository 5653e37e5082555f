"""Everything that decides a plan, and the key made of it."""
