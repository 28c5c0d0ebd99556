"""Read and write LoRA adapters in PEFT's format."""
