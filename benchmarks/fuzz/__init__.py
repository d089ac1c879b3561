"""Artifacts with something changed in them, by the ten thousand: none may do harm."""
