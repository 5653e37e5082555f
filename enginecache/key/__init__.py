"""The key of a plan, and the request values that it is made of."""
