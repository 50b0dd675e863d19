"""The one place with the version number: of the package, of what it installs, and of what it keeps on disk."""

__version__ = "0.1.0"
