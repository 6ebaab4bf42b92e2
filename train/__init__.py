"""Ray Train loops: empty until fine-tuning lands, but part of the checked directions of imports."""
