"""Ray actors and placement: the worker pool, the supervisor, and bring-up of the embedded cluster."""
