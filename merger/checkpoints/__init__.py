"""What a model holds: names, shapes, dtypes and places of its tensors. Never their bytes."""
