"""Models and tokenizers: loading, adapters, prefix sharing and its proof, log-probs, the reference, the token budget."""
