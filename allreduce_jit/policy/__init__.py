"""Pure: the same inputs give the same answer on every rank."""
