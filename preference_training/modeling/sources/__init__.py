"""Where models come from besides a directory in Hugging Face format: GGUF files, and what is said where a source fails."""
