"""What will be made, in integers, before a byte of a tensor is read."""
