"""The judge of an export: does it compute the same, and what do few bits cost?"""
