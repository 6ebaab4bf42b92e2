"""Embedding models and rerankers behind the HTTP interface: what waits, who computes it, which model is meant."""
