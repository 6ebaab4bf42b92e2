"""Merging models: published formulas, streamed through blocks of tensors, one output file after another."""
