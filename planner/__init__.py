"""The planner: memory and speed of a fine-tune from a configuration alone. No torch anywhere."""
