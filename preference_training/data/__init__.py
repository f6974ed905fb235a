"""From data sets of any form to tables of token ids: entries, files, templates, tokenization, preparation."""
