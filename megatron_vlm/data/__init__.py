"""The data room: what a sample is on disk, where it goes in a batch, and how its bytes are read.

`build` writes a data set once; `index` opens it; `plan` places every sample from metadata alone;
`fetch`, `pictures` and `collate` read only what one rank computes on; `loader` does so ahead of
time. Submodules are imported by name, so that planning needs no torch and building no model.
"""
