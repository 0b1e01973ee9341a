"""LoRA adapters: what their files hold, and which tensors of a model they mean."""
