"""Merging models by mergekit's YAML, tensor by tensor. `methods` knows tensors alone; `merge_models` writes a folder."""
