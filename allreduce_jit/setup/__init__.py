"""All ranks agree on a path and build it."""
