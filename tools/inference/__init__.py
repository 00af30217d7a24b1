"""Load a trained network and the images to run it on, for the tools that need one."""
