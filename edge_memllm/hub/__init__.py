"""Models of the Hugging Face Hub: a name like `org/name` becomes a local folder.

Only what a manifest names is downloaded, checked against it, and kept as plain files. Knows the
library `huggingface_hub`, imported when something is to be downloaded; nothing of models.
"""

from edge_memllm.hub.download import artifact_folder, checkpoint_folder
from edge_memllm.hub.names import HubModel

__all__ = ["HubModel", "artifact_folder", "checkpoint_folder"]
