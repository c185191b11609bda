"""Pneumothorax segmentation on chest X-rays: from images and run-length annotations to a submission."""

__version__ = "0.1.0"
