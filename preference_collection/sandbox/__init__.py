"""Unit tests of model-written code, which is untrusted: isolated processes, and runs in the background."""
