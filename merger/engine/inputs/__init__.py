"""How inputs that are no stored tensors are read: rows, adapters, packed numbers, what is computed of others."""
