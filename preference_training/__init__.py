"""Supervised fine-tuning and preference optimization of language models, one package for each stage that data passes."""
