"""One configuration from YAML files and a command line: composed, and validated before anything expensive starts."""
