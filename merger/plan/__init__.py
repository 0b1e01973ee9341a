"""What will be made, in integers: no torch, no bytes."""
