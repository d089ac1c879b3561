"""Looking into the memory: what a token's rows and keys do, and where in a text they matter.

`open_subject` opens a checkpoint or an artifact, `explain` answers `Questions` about it, and
`findings` has what comes out. Light when imported: only `network` loads torch, for it
needs a checkpoint's weights.
"""

from edge_memllm.interpretation.explaining import Questions, Subject, explain, open_subject

__all__ = ["Questions", "Subject", "explain", "open_subject"]
