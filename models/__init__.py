"""What is optimised: the network and its losses."""

from models.deeplabv3 import DeepLabV3

__all__ = ["DeepLabV3"]
