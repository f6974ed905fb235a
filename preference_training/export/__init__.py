"""Trained models for use elsewhere: merged, converted, with a Modelfile, on the hub."""
