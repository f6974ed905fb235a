"""Unit tests of model-written code, which is untrusted: isolated processes, code in replies, pass rates of programs."""
