"""GGUF, the files that llama.cpp reads: what stands in one."""
