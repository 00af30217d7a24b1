"""A trained network and the images that it is run on, for the tools that need one."""
