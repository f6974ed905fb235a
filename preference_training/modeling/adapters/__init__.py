"""LoRA adapters: which layers take one, adding, loading, switching and merging it.

An adapter is injected into the model's own modules, so whatever serves a model serves one with an adapter. With its adapter
switched off the model is the one that training started from: the reference then needs no memory of its own. Where training
starts from an adapter, a frozen copy of that adapter is switched on for the reference.
"""
