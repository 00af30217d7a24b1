"""The command line: what a flag is, how argv and YAML become settings, the flags of networks."""
