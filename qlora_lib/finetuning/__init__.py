"""Fine-tuning a causal language model: its data, its training, its generations."""
