"""Who makes artifacts, as they say themselves. Imports nothing, so that everybody can ask."""

__version__ = "0.1.0"  # of all that is installed together

PRODUCER = f"edge-memllm {__version__}"
