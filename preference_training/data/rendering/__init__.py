"""Conversations as text in a chat template, and texts as token ids."""
