"""LaVIN: a frozen LLaMA and a frozen CLIP tower joined by mixture-of-modality adapters."""
