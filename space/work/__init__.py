"""The queue of merges and the processes that make them."""
