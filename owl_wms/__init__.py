"""Fast, verified VAE decoding for real-time world models, and the world model that uses it.

Importing this package touches neither CUDA, TensorRT nor diffusers.
"""

__version__ = "0.1.0"
