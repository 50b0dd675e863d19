"""From a module of the catalogue to machine code, kept on disk."""
