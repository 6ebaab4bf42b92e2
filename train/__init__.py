"""Ray Train loops. Empty until fine-tuning lands; the package exists so that import directions are checked from the start."""
