"""Files to uint8 tensors on the device: codec, images, cases, folds, pack, feed, phantom."""
