"""What every graph is made of: the builder, the blocks, the way tokens come in."""
