"""Rounds: sample from the policy, judge, pair, train, again."""
