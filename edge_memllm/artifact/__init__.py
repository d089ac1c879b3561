"""An artifact on disk: its folder, manifest and headers, and how files come to stand whole."""
