"""Records: prompts, responses and pairs as text, their validation, and which of them are held out."""
