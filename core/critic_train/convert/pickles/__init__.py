"""Pickles and torch archives read without running anything of theirs: tensors, arrays, plain containers, no more."""
