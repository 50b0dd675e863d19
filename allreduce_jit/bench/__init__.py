"""How fast it is, beside whom."""
