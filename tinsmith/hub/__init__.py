"""Read and write Hugging Face folders, Tinsmith checkpoints and PEFT adapters."""
