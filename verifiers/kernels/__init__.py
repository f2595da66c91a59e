"""The numba kernels: IoU, matching, average precision, and the scores made of them. Hands on nothing: they load numba."""
