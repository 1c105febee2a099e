"""3-D networks for PyTorchVideo and timm. This version has none yet; CHANGELOG.md tells what each version adds."""
