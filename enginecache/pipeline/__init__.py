"""The steps of one `get`, in their order."""
