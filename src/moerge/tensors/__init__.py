"""Element types, codecs, kernels, streams and views: what a tensor is before it belongs to a checkpoint."""
