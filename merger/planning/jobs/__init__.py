"""The jobs of an output: how each of its tensors is made of those of whole models."""
