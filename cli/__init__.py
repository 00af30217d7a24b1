"""Read the command line: flag types, argv and YAML, the flags of networks, checks of paths."""
