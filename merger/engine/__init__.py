"""Making it: read blocks, call the method, round once, write."""
