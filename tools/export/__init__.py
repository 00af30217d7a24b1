"""`python -m tools.export`: a trained network as ONNX, torchvision or timm weights."""
