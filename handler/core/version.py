"""The version, told by the command line, the API and the pictures."""

__version__ = "0.1.0"
