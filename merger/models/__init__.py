"""What a model's files hold: tensors and their names, config, vocabulary, adapters, experts, licence."""
