"""What token rows can do for a dense model: layer by layer, as a student, and added to it."""
