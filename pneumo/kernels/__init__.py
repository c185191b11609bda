"""What other rooms share: runs of masks for data and decision, convolutions for the model.

Its modules import errors, and each other.
"""
