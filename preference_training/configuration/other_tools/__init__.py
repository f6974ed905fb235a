"""What the options of other tools are called here."""
