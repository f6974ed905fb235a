"""From YAML files and a command line to one configuration, validated before anything expensive starts."""
