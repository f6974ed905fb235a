"""Prefix sharing: a model computes once what sequences share at their beginning.

`tree_attention` is the attention that makes it possible, `proof` compares it with the model's own attention when the model is
loaded, and `sharing` switches it on.
"""
