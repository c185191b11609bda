"""A uint8 batch to a loss: network, its folded form, augmentation, losses."""
