"""The probes: measured (GPU) and traced (meta device) truth about a step."""
