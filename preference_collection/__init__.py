"""The labeling app: people choose the better of two solutions to a programming problem, and the choices become training data.

Of the root it uses the shape of preference data and what reads rows into it, nothing else.
"""
