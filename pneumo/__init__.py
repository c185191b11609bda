"""Pneumothorax segmentation on chest X-rays: from images and run-length annotations to a submission."""

import os

# read when torch is imported: its store's C++ traces of a lost connection would bury the one line that has the cause
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
