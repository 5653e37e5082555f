"""The store: immutable blobs named by their digest, in a checked folder."""
