"""Configurations of other tools, read as ours: one file of rows per tool, one walk over them."""
