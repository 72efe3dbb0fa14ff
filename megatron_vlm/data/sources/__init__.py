"""Sources: every form of data that a set can be built from, read into `data.draft`'s parts.

`opening.open_source` looks at what is there and takes the fitting form. Each form is deterministic,
streams its files, can be read again from any entry on, and says of every bad entry why it is bad.
Submodules are imported by name.
"""
