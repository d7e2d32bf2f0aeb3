"""fastload: load any Hugging Face checkpoint into PyTorch at the speed the hardware allows, and save it back."""

__version__ = "0.1.0"
