"""The lookup table: where rows of tokens come from, and how the table is written."""
