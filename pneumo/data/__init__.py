"""Files to uint8 tensors on the device: codec, images, rows, problems, cases, folds, pack, feed, phantom."""
