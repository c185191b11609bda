"""What other rooms share: runs of masks for data and decision, convolutions for the model.

Imports nothing from pneumo.
"""
