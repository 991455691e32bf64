"""The speed model: FLOPs, bytes and kernel launches of a step become seconds on a device."""
