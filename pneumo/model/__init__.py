"""A uint8 batch to a loss: network, augmentation, losses."""
