"""Export a trained network to ONNX, torchvision or timm weights: `python -m tools.export`."""
