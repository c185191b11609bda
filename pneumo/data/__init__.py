"""Files to uint8 tensors on the device: codec, images, DICOM, rows, problems, cases, folds, pack, feed, phantom."""
