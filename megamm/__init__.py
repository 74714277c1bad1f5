"""megamm: train native multimodal models and plan their scaling."""

__version__ = "0.1.0"
