"""One model from the weights of several: averages, SLERP, task arithmetic, TIES, DARE, and soups of runs."""
