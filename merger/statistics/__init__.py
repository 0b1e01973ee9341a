"""What data-aware methods have to know of a model, measured once, a layer at a time, and published like a model."""
