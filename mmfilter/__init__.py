"""Curate image-text data with the features inside a multimodal model."""

__version__ = "0.1.0"
