"""One opened cache folder: registry, blobs, locks, last uses."""
