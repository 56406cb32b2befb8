"""Compiled blocks: making a package, finding the one that fits, and how compiling failed."""
