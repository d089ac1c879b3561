"""How many tokens of a prompt are computed at a time where nobody says. Imports nothing."""

from __future__ import annotations

# More is a little faster and takes memory in proportion.
PREFILL_CHUNKS = {"cpu": 128, "cuda": 1024}
# Between two steps of the replies under way, which a longer stretch of a prompt would hold up.
SERVING_CHUNK = 64
