"""Checkpoints in Hugging Face layout: read tensor by tensor, written shard by shard."""
