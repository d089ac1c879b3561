"""The commands that measure and explain a model."""
