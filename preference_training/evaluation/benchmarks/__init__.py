"""Benchmarks that people quote: pair accuracy as RewardBench, win rates as AlpacaEval and Arena-Hard."""
