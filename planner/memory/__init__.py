"""The memory model: live bytes at each instant of a step, and what the allocator must reserve."""
