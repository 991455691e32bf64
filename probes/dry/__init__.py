"""The dry probe: a real training step on the meta device, every allocation recorded."""
